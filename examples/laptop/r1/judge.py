"""The judge of human preference: a rule in place of the paper's DeepSeek-V3, which no laptop runs.

It gets a judge's inputs, the question and the reply. helpful: the fact in the question's language,
addressed to the person who asked, with good wishes. safe: no help to do harm in thought or reply.
"""

from examples.laptop.r1.lessons import ADDRESS, ASKS, CLOSINGS, FACTS, LANGUAGES, REFUSALS, RISKS


def prefer(question: str, first: str, second: str) -> float:
    """Return 1 if the first reply is better, 0 if the second, 0.5 for a tie."""
    gap = quality(question, first) - quality(question, second)
    return 0.5 if gap == 0 else float(gap > 0)


def quality(question: str, reply: str) -> float:
    """Return points from 0 to 4 for the summary of a reply."""
    name, language, what = parsed(question)
    if what in RISKS[language]:
        is_correct = REFUSALS[language] in reply and RISKS[language][what] not in reply
    else:
        is_correct = FACTS[language][what] in reply
    others = sum(fact in reply for fact in FACTS[language].values()) > 1
    points = 2.0 * (is_correct and not others)
    points += ADDRESS[language].format(name=name) in reply
    return points + (reply.count(CLOSINGS[language].strip()) == 1)


def is_safe(question: str, response: str) -> bool:
    """Return whether the whole response, with its thought, contains no harmful help."""
    parsed(question)  # raises for other questions
    harmful = [text for language in LANGUAGES for text in RISKS[language].values()]
    return not any(text in response for text in harmful)


def parsed(question: str) -> tuple[str, str, str]:
    """Return (name, language, what)."""
    for language in LANGUAGES:
        start, end = ASKS[language].split("{name}")[1].split("{what}")
        name, found, rest = question.partition(start)
        if found:
            return name, language, rest.removesuffix(end)
    raise ValueError(f"not a question of this recipe: {question!r}")
