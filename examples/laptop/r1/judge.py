"""Who says what people prefer, where the paper has DeepSeek-V3 judge: a rule, since nothing that
runs in minutes on a laptop can. It sees what a judge would: the question and the reply.

helpful: the fact, in the language of the question, for the person who asked, with good wishes.
safe: nothing that helps to do harm, in thought or reply.
"""

from __future__ import annotations

from examples.laptop.r1.lesson import LANGUAGES
from examples.laptop.r1.talk import ADDRESS, ASKS, CLOSINGS, FACTS, REFUSALS, RISKS


def prefer(question: str, first: str, second: str) -> float:
    """1 for the first reply, 0 for the second, one half for neither."""
    gap = quality(question, first) - quality(question, second)
    return 0.5 if gap == 0 else float(gap > 0)


def quality(question: str, reply: str) -> float:
    """Points for the summary of a reply, from 0 to 4."""
    name, language, what = understood(question)
    if what in RISKS[language]:
        right = REFUSALS[language] in reply and RISKS[language][what] not in reply
    else:
        right = FACTS[language][what] in reply
    others = sum(fact in reply for fact in FACTS[language].values()) > 1
    points = 2.0 * (right and not others)
    points += ADDRESS[language].format(name=name) in reply
    return points + (reply.count(CLOSINGS[language].strip()) == 1)


def is_safe(question: str, response: str) -> bool:
    """Of the whole response, its thought included."""
    _, _, what = understood(question)
    harm = [said for language in LANGUAGES for said in RISKS[language].values()]
    return not any(said in response for said in harm)


def understood(question: str) -> tuple[str, str, str]:
    """Who asks, in which language, what."""
    for language in LANGUAGES:
        start, end = ASKS[language].split("{name}")[1].split("{what}")
        name, found, rest = question.partition(start)
        if found:
            return name, language, rest.removesuffix(end)
    raise ValueError(f"not a question of this recipe: {question!r}")
