r"""What stands right beside the last box of an answer, and changes it: `-\boxed{13}`,
`\boxed{13}^2`, `less than \boxed{13}`, `\boxed{13} is wrong`. Other text explains the answer."""

import re

from megatron_r1.rewards.answer import box_span
from megatron_r1.rewards.wording import CHANGED

MAX_BEFORE_CHARS = 200
# `adds up to \boxed{13}` states a sum.
NO_SUM = "(?<!add )(?<!adds )(?<!adding )(?<!sum )(?<!sums )"
BEFORE = re.compile(
    r"(?:(?:^|[=({\[:,])[\s$]{0,9}[-−][\s$]{0,9}"
    r"|(?:^|[\s$])[-−–]\$?"
    r"|\\(?:sqrt|[dt]?frac|not|neg|pm|mp|log|ln|neq?|[lg]eq?|[lg]t)\s*"
    r"(?:\{[^{}]{0,80}\}\s*)?\{?[\s$]{0,9}"
    r"|(?:[<≠√∛]|(?<![-=\n])>)[\s$]{0,9}"
    r"|(?:\b(?:not|never|cannot|(?:less|more|fewer|greater|other) than|at (?:least|most)"
    rf"|{NO_SUM}up to|half of|twice|negative|minus)|n['’]t)\b[\s$*]{{0,9}}"
    r"(?:(?:be|is|equal|equals|exactly|to)\b[\s$*]{0,9}){0,3})$",
    re.IGNORECASE,
)
ROUNDED = re.compile(
    r"\b(?:about|approximately|roughly|nearly|almost)\b[\s$*]{0,9}"
    r"(?:(?:be|is|equal|equals|exactly|to)\b[\s$*]{0,9}){0,3}$",
    re.IGNORECASE,
)
"""Words that leave a whole number open. A decimal is what they round to: `about \\boxed{3.14}`."""
DECIMAL = re.compile(r"\.\d")
BULLET = re.compile(r"(?:^|(?<=[^=({\[,+\s]))[^\S\n]{0,9}\n\s{0,9}[-*+>][^\S\n]{1,9}$")
"""The mark of an item of a list, `- \\boxed{13}`, on a line of its own."""
AFTER = re.compile(
    r"(?![\s$]{0,9}\n[^\S\n]{0,9}[-*+]\s)[\s$]{0,9}(?:\^(?!\s*\{?\s*\\circ)|[-+*/]\s*(?:[\d(]"
    r"|\\(?:sqrt|[dt]?frac|pi)(?![A-Za-z]))|\\(?:pm|mp|cdot|times|div)(?![A-Za-z]))"
)


def changes_box(text: str) -> bool:
    """Return whether the text beside the last box changes the box's value, or denies it. It takes
    time linear in the length of the text."""
    span = box_span(text)
    if span is None:
        return False
    start, end = span
    before = BULLET.sub("\n", text[max(start - MAX_BEFORE_CHARS, 0) : start])
    if ROUNDED.search(before) and not DECIMAL.search(text[start:end]):
        return True
    return any((BEFORE.search(before), AFTER.match(text, end), CHANGED.match(text, end)))
