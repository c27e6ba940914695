r"""Reads the text around a number or a box, which states it as the answer, denies it or changes it.

`the answer is 204` and `we get $204$` state it; `less than $204$`, `it cannot be $204$` and
`half of the answer is 204` do not. Whether words state a number is decided by lists of what does:
there are too many ways to say something else. `changes_box` finds text next to the last box of an
answer, in its line, that changes it: `-\boxed{13}`, `\boxed{13}^2`, `less than \boxed{13}`,
`\boxed{13} is wrong`. Other text explains the answer."""

import re

from r1_grading.reading.tags_and_boxes import box_span

# Subjects and verbs of another value: `the lower bound is`, `it could be`, `suppose x is`.
DENYING = """
    not never no cannot neither nor nobody none hardly false wrong incorrect untrue mistaken doubt
    less more greater smaller fewer larger bigger lower higher above below over under beyond
    exceed exceeds bound bounds bounded within between near nearly almost close around about
    approximately approximate approximation approx roughly circa estimate estimated
    except excluding besides but unlike instead rather different other than unequal off far
    opposite negative minus reciprocal inverse half twice double triple
    if unless whether suppose assume assuming let guess maybe perhaps possibly probably could might
    may would
"""
DENIAL = re.compile(
    rf"\b(?:{'|'.join(DENYING.split())}|at (?:least|most|best|worst))\b|n['’]t\b", re.IGNORECASE
)
CHANGE_AFTER = re.compile(
    r"[\s$*)]{0,9}(?:[!?]*\?|\+(?=[\s$*.]*$)|-?ish\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed)\b"
    r"|(?:less|fewer)(?=[\s$*.!]*$)"
    r"|or (?:more|less|fewer|so|maybe|perhaps|possibly)\b|\(?(?:not|un)\s?(?:sure|certain)\b"
    r"|(?:is|was) (?:too|wrong|incorrect|false)\b"
    r"|(?:is|was)(?: not|n['’]t)(?=[\s$*]*(?:$|[.,;:!?)])"
    r"|(?: (?:it|the|my|an?|final|correct|right|valid|required)){0,3}"
    r" (?:it|answer|solution|correct|right|valid|true|possible)\b))",
    re.IGNORECASE,
)
"""Text after a number which shows that the number alone is not the answer: `122 million`, `122 or
so`, `122 is wrong`, `122 squared`, `122?`. `122 is not listed` may explain the answer."""
# What may stand right before a formula that is the answer: `we get`, `equal to`, `a total of`.
LEAD = re.compile(
    r"(?:^|[:=,.]|\b(?:is|are|was|were|be|equals?|gives?|get|gets|got|have|has|had|find|finds|found"
    r"|obtain|obtains|yields?|conclude|that|makes?|takes?|took|costs?|earns?|needs?|leaves|becomes?"
    r"|means|giving|yielding|leaving|so|thus|hence|therefore|then|finally|exactly|only|just|precisely|simply|answer|value"
    r"|result|(?:given|obtained) by|to be"
    r"|(?:equal|equals|simplif(?:y|ies)|evaluates?|comes?|amounts?|reduces?|sums?|adds? up"
    r"|converges?|leads?) to"
    r"|(?:total|sum|value|area|volume|length|distance|probability|perimeter|average|speed|maximum"
    r"|minimum|radius|cost) of))[\s*:]*$",
    re.IGNORECASE,
)
ANSWER_IS = re.compile(
    r"(?<!\w)answer\b(?: to (?:the|this|that|your) (?:question|problem|puzzle))?[\s*]*"
    r"(?:(?:is|to)\b|[:=]|(?=\s\S))(?:\s+(?:therefore|thus|then|simply|just|exactly)\b)?[\s:*=]*",
    re.IGNORECASE,
)
# The words of a clause up to `answer`, where it states the answer: `so the final answer`.
BEFORE_ANSWER = """
    the a an my our your this that it final correct right simplified numerical numeric exact best
    required desired expected complete short full and so thus hence therefore then finally now
    which means implies gives here's here is we i get have see conclude say can to question
    problem option choice multiple closed form integer decimal answer
"""
CLAUSE = re.compile(r".*[.,;:!?)\n{}]", re.DOTALL)
CONCLUSION = re.compile(
    r"(?:(?:and|so|thus|hence|therefore|then|finally|consequently|accordingly|overall|in total"
    r"|as a result|in (?:conclusion|summary|short)"
    r"|(?:it|this|which) (?:follows|means|implies|gives|shows|yields)(?: us)?(?: that)?"
    r"|we (?:get|have|find|obtain|conclude|see|know)(?: that)?)\b"
    r"|\\(?:therefore|implies|Rightarrow|Longrightarrow|rightarrow|to)(?![A-Za-z])|[∴⇒⟹→]|=>)"
    r"\s*[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
MAX_CONCLUSIONS = 4


def leads_to_answer(before: str) -> bool:
    """Whether `before`, the sentence up to a formula, states the formula."""
    return DENIAL.search(before) is None and LEAD.search(before.rstrip(" $*")) is not None


def after_answer_is(text: str) -> str | None:
    """Return the text after the last "answer is", "answer:" or "answer =", "" included.

    None where there is none, or where the words before it change it: `the wrong answer is`."""
    phrases = list(ANSWER_IS.finditer(text))
    if not phrases:
        return None
    clause = CLAUSE.sub("", text[: phrases[-1].start()]).lower()
    if not set(BEFORE_ANSWER.split()).issuperset(clause.strip("*#$ ").split()):
        return None
    return text[phrases[-1].end() :]


def without_conclusion(text: str) -> str:
    """Return `text` without words that draw a conclusion: `So`, `Therefore, we get`."""
    for _ in range(MAX_CONCLUSIONS):
        text = text[match.end() :] if (match := CONCLUSION.match(text)) else text
    return text


MAX_BESIDE_CHARS = 200
LINK_WORDS = r"[\s$*]{0,9}(?:(?:be|is|equal|equals|exactly|to)\b[\s$*]{0,9}){0,3}$"
OPERATION_BEFORE_BOX = re.compile(
    # A sign: right before the box, after `=` or a bracket, or at the beginning of a formula. With a
    # space or a dollar sign after it, it may also be a dash: `Final answer: - $\boxed{13}$`.
    r"(?:(?:^|[\s$({\[=:,*])[-−]$|[=({\[]\s{0,9}[-−–][\s$]{0,9}$|(?:^|(?<=[\s(*$]))\$\s?[-−–]\s{0,9}$"
    r"|^[-−]\$$|\b(?:is|equals)\s[-−]\$$"
    # An operator or function, and up to one argument of it.
    r"|\\(?:sqrt\s*(?:\[[^][]{0,20}\])?|[dt]?frac\s*(?:\{[^{}]{0,80}\})?"
    r"|(?:log|ln)\s*(?:_\s*(?:\w|\{[^{}]{0,20}\}))?|not|neg|pm|mp|neq?|[lg]t)\s*\{?[\s$]{0,9}$"
    r"|(?:[<≠√∛]|(?<!^)(?<![-=<>|｜])>)[\s$]{0,9}$"
    r"|(?:\b(?:not|never|cannot|(?<!no )(?<!not )(?:less|more|fewer|greater|other) than|half of"
    rf"|twice|negative|minus)|n['’]t)\b{LINK_WORDS})",
    re.IGNORECASE,
)
NO_SUM = "(?<!add )(?<!adds )(?<!adding )(?<!sum )(?<!sums )"
"""`adds up to \\boxed{13}` states a sum."""
BOUND_BEFORE_BOX = re.compile(
    rf"(?:^\s*[-−–][\s$]{{0,9}}$|\\[lg]eq?\s*\{{?[\s$]{{0,9}}$|\b(?:at (?:least|most)|{NO_SUM}up to"
    rf"|not? (?:less|more|fewer|greater) than)\b{LINK_WORDS})",
    re.IGNORECASE,
)
"""A dash that may be a sign, and bounds, which a question may ask for. They change the box only
where an answer is alone, in tags."""
ROUNDED_BOX = re.compile(
    rf"\b(?:about|approximately|roughly|nearly|almost)\b{LINK_WORDS}", re.IGNORECASE
)
"""Words that leave a whole number open, in tags. A decimal is what they round to: `about
\\boxed{3.14}`."""
DECIMAL = re.compile(r"\.\d")
LINE_MARK = re.compile(r"^\s{0,9}(?:(?:>|[-*+](?=\s)|\d{1,2}[.)](?=\s))\s{0,9}){0,4}")
"""Marks of quotes and lists at the beginning of a line: `> \\boxed{13}`, `- \\boxed{13}`."""
HTML_TAG = re.compile(r"</?[A-Za-z][^<>]{0,80}>")
OPERATION_AFTER_BOX = re.compile(
    # A power, but not a degree or an ordinal (`^\circ`, `^{th}`, `^\text{th}`).
    r"\s{0,9}(?:\^\s*\{?\s*(?:[-+]?\d|[a-np-z](?![a-z])|\\(?:[dt]?frac|sqrt|pi)(?![a-z]))"
    # `\boxed{13} - 1`; after a formula that ends, it is a dash: `$\boxed{13}$ - 5 and 8 added`.
    r"|[-+*/]\s*(?:\d|\\(?:sqrt|[dt]?frac|pi)(?![a-z]))|[-+*/]\("
    r"|\\(?:pm|mp|cdot|times|div)(?![a-z]))",
    re.IGNORECASE,
)
CHOICE = re.compile(r"\\f?box(?:ed)?\s*\{(?:\\[a-z]{1,9}\s*\{|[\s$(]){0,4}[A-J][\s$).}]{1,6}")
"""A box with a choice. What follows may be its text: `\\boxed{A} - 13 apples`."""


def changes_box(text: str, *, alone: bool = False) -> bool:
    """Return whether the text next to the last box, in its line, changes its value or denies it.

    It takes time linear in the length of the text.

    Args:
        text: the text with the box.
        alone: whether the text is an answer alone, without its solution. It must commit itself, so
            `about` and `at most` change it, too."""
    span = box_span(text)
    if span is None:
        return False
    start, end = span
    text_before = text[max(start - MAX_BESIDE_CHARS, 0) : start]
    text_after = text[end : end + MAX_BESIDE_CHARS].partition("\n")[0]
    is_first_line = "\n" not in text_before
    text_before = HTML_TAG.sub("", text_before.rpartition("\n")[2])
    if not (alone and is_first_line):
        text_before = LINE_MARK.sub("", text_before, count=1)
    if text_before.endswith("*"):
        text_after = text_after.lstrip("*")  # it ends an emphasis, and is no product
    is_choice = CHOICE.fullmatch(text, start, end) is not None
    if OPERATION_BEFORE_BOX.search(text_before) or (
        not is_choice and OPERATION_AFTER_BOX.match(text_after)
    ):
        return True
    is_open = ROUNDED_BOX.search(text_before) and not DECIMAL.search(text, start, end)
    if alone and (is_open or BOUND_BEFORE_BOX.search(text_before)):
        return True
    # A question may ask for the choice that is wrong: `\boxed{B} is false`.
    is_number = re.search(r"\d", text[start:end]) is not None
    return (alone or is_number) and CHANGE_AFTER.match(text_after) is not None
