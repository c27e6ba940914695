r"""What stands right beside the last box of an answer, and changes it: `-\boxed{13}`,
`\boxed{13}^2`, `less than \boxed{13}`, `\boxed{13} is wrong`. Other text explains the answer."""

import re

from megatron_r1.rewards.answer import box_span
from megatron_r1.rewards.reading import CHANGED

BEFORE = re.compile(
    r"(?:(?:^|[=({\[:,])[\s$]{0,9}-[\s$]{0,9}"
    r"|\\(?:sqrt|[dt]?frac|not|neg|pm|mp|log|ln|neq?|[lg]eq?|[lg]t)\s*"
    r"(?:\{[^{}]{0,80}\}\s*)?\{?[\s$]{0,9}"
    r"|[<>≠][\s$]{0,9}"
    r"|(?:\b(?:not|never|cannot|(?:less|more|fewer|greater|other) than|at (?:least|most)|up to"
    r"|about|approximately|roughly|nearly|almost|half of|twice|negative|minus)|n['’]t)\b[\s$*]{0,9}"
    r"(?:(?:be|is|equal|equals|exactly|to)\b[\s$*]{0,9}){0,3})$",
    re.IGNORECASE,
)
AFTER = re.compile(
    r"[\s$]{0,9}(?:\^|[-+*/]\s*(?:[\d(]|\\(?:sqrt|[dt]?frac|pi)(?![A-Za-z]))"
    r"|\\(?:pm|mp|cdot|times|div)(?![A-Za-z]))"
)


def changes_box(text: str) -> bool:
    """Return whether the text beside the last box changes the box's value, or denies it."""
    span = box_span(text)
    if span is None:
        return False
    start, end = span
    before = text[max(start - 200, 0) : start]
    return any((BEFORE.search(before), AFTER.match(text, end), CHANGED.match(text, end)))
