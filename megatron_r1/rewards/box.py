r"""What stands right beside the last box of an answer, in its line, and changes it: `-\boxed{13}`,
`\boxed{13}^2`, `less than \boxed{13}`, `\boxed{13} is wrong`. Other text explains the answer."""

import re

from megatron_r1.rewards.answer import box_span
from megatron_r1.rewards.wording import CHANGED

MAX_BESIDE_CHARS = 200
LINKS = r"[\s$*]{0,9}(?:(?:be|is|equal|equals|exactly|to)\b[\s$*]{0,9}){0,3}$"
BEFORE = re.compile(
    # A sign: right before the box, after `=` or a bracket, or at the beginning of a formula. With a
    # space or a dollar sign after it, it may also be a dash: `Final answer: - $\boxed{13}$`.
    r"(?:(?:^|[\s$({\[=:,*])[-−]$|[=({\[]\s{0,9}[-−–][\s$]{0,9}$|(?:^|(?<=[\s(*$]))\$\s?[-−–]\s{0,9}$"
    r"|^[-−]\$$|\b(?:is|equals)\s[-−]\$$"
    # An operator or function, and up to one argument of it.
    r"|\\(?:sqrt\s*(?:\[[^][]{0,20}\])?|[dt]?frac\s*(?:\{[^{}]{0,80}\})?"
    r"|(?:log|ln)\s*(?:_\s*(?:\w|\{[^{}]{0,20}\}))?|not|neg|pm|mp|neq?|[lg]t)\s*\{?[\s$]{0,9}$"
    r"|(?:[<≠√∛]|(?<!^)(?<![-=<>|｜])>)[\s$]{0,9}$"
    r"|(?:\b(?:not|never|cannot|(?<!no )(?<!not )(?:less|more|fewer|greater|other) than|half of"
    rf"|twice|negative|minus)|n['’]t)\b{LINKS})",
    re.IGNORECASE,
)
NO_SUM = "(?<!add )(?<!adds )(?<!adding )(?<!sum )(?<!sums )"
"""`adds up to \\boxed{13}` states a sum."""
UNCOMMITTED = re.compile(
    rf"(?:^\s*[-−–][\s$]{{0,9}}$|\\[lg]eq?\s*\{{?[\s$]{{0,9}}$|\b(?:at (?:least|most)|{NO_SUM}up to"
    rf"|not? (?:less|more|fewer|greater) than)\b{LINKS})",
    re.IGNORECASE,
)
"""A dash that may be a sign, and bounds, which a question may ask for. They change the box only
where an answer is alone, in tags."""
ROUNDED = re.compile(rf"\b(?:about|approximately|roughly|nearly|almost)\b{LINKS}", re.IGNORECASE)
"""Words that leave a whole number open, in tags. A decimal is what they round to: `about
\\boxed{3.14}`."""
DECIMAL = re.compile(r"\.\d")
LINE_MARK = re.compile(r"^\s{0,9}(?:(?:>|[-*+](?=\s)|\d{1,2}[.)](?=\s))\s{0,9}){0,4}")
"""Marks of quotes and lists at the beginning of a line: `> \\boxed{13}`, `- \\boxed{13}`."""
HTML_TAG = re.compile(r"</?[A-Za-z][^<>]{0,80}>")
AFTER = re.compile(
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
    """Return whether the text beside the last box, in its line, changes the box's value, or denies
    it. It takes time linear in the length of the text.

    alone: whether the text is an answer alone, without its solution. It must commit itself, so
    `about` and `at most` change it, too."""
    span = box_span(text)
    if span is None:
        return False
    start, end = span
    before = text[max(start - MAX_BESIDE_CHARS, 0) : start]
    after = text[end : end + MAX_BESIDE_CHARS].partition("\n")[0]
    is_first_line = "\n" not in before
    before = HTML_TAG.sub("", before.rpartition("\n")[2])
    if not (alone and is_first_line):
        before = LINE_MARK.sub("", before, count=1)
    if before.endswith("*"):
        after = after.lstrip("*")  # it ends an emphasis, and is no product
    is_choice = CHOICE.fullmatch(text, start, end) is not None
    if BEFORE.search(before) or (not is_choice and AFTER.match(after)):
        return True
    is_open = ROUNDED.search(before) and not DECIMAL.search(text, start, end)
    if alone and (is_open or UNCOMMITTED.search(before)):
        return True
    # A question may ask for the choice that is wrong: `\boxed{B} is false`.
    is_number = re.search(r"\d", text[start:end]) is not None
    return (alone or is_number) and CHANGED.match(after) is not None
