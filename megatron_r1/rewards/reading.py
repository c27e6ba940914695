"""Reads a response's final answer, at the place of `rewards.answer`.

`strict` is DeepSeek-R1-Zero's: a policy learns the form in which it answers. Models that were
trained before, on forms of their own, are graded by where they put their answers: in a box, or in
the last line, as "The sum of 59 and 63 is 122."."""

import re
from collections.abc import Callable
from typing import Literal, get_args

from megatron_r1.rewards.answer import (
    MARKER,
    OPEN_THOUGHT,
    Extraction,
    after_thought,
    extract,
    in_tags,
    last_boxed,
    last_line,
    present,
    without_special_tokens,
)
from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.box import changes_box
from megatron_r1.rewards.wording import CHANGED, DENIAL, after_answer_is

Reading = Literal["strict", "tags", "boxed", "last", "auto"]
READINGS: tuple[str, ...] = get_args(Reading)
READERS = ("math", "logic")
"""The rewards whose option `reading` `rewards.answer` sets."""
# A number with commas or spaces between its thousands, or with a fraction after the whole.
DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?![\d/])|\d+(?: \d+(?=/\d))?)(?:\.\d+)?(?:/\d+)?"
)
LAST_NUMBER = re.compile(
    rf"(?<![\w.,:/^{{\\+*√∛∜-])[-+]?\$?(?P<number>[-+]?{DIGITS})"
    r"(?:\\?%)?(?![\w^{√∛∜⁻]|[.,:/]\d)"
)
"""A number that no letter, formula or longer number goes on from: not the 2 of x^2 or of 3.14.2."""
SIGNS = str.maketrans({**dict.fromkeys("−–‐－", "-"), **dict.fromkeys("⁄∕", "/")})
"""Characters that are a minus sign or a fraction's bar."""
SIGN_APART = re.compile(r"([=(:]|\b(?:is|equals))([\s$]{0,9}-)\s{1,9}(?=\$?\d)", re.IGNORECASE)
"""A minus sign with a space after it, `x = - 13`. One that begins a line is the mark of a list."""
JOINED = re.compile(
    r"\d[\s$)]{0,9}[,;(.]?[\s$]{0,9}(?:[,;&|~^/]|(?:or|and|to|vs\.?|versus|maybe|perhaps|possibly"
    r"|(?:or|but) (?:maybe|perhaps|possibly)|times|plus|minus)\b|[-+*×÷·⋅]"
    r"|\\(?:times|cdot|div)\b)[\s$(.]{0,9}$"
    # Parts of one quantity: `3 hours 20 minutes`, `12 remainder 5`, `12 13`.
    r"|\d\$?\s[\s$]{0,9}$"
    r"|\d\s{0,9}(?:h|hrs?|hours?|m|mins?|minutes?|s|secs?|seconds?|days?|weeks?|months?|years?|feet"
    r"|foot|ft|inch(?:es)?|yards?|miles?|km|kilomet(?:er|re)s?|met(?:er|re)s?|lbs?|pounds?|kg"
    r"|kilograms?|dollars?|euros?|quarts?|gallons?|degrees?|°|['′’]|dozens?|tens|r|rem|remainder"
    r"|(?:(?:and|with) )?an? remainder(?: of)?|with remainder)\.?,?\s{0,9}(?:and\s{1,9})?$",
    re.IGNORECASE,
)
"""Text that joins the last number to an earlier one: two candidates (`12 or 13`), a calculation
that is not worked out and may be the question (`2 + 11`), or parts of one quantity."""
TERM_BEFORE = re.compile(
    r"(?:(?<![A-Za-z])[A-Za-z]|[\])}])[\s$]{0,9}(?:[-+*/×÷·⋅]|\\(?:times|cdot|div)\b)[\s$(]{0,9}$"
    r"|[A-Za-z][\s$]{0,9}[+×÷·⋅][\s$(]{0,9}$"
)
"""A number after it is the last term of an expression: `2x + 3`, `n - 3`."""
SIGNED_TERM_BEFORE = re.compile(r"(?:(?<![A-Za-z])[b-zB-HJ-Z]|[\d\])}])[\s$]{1,9}$")
"""The same, for a number with its own sign: `n -3`."""
TERM_AFTER = re.compile(
    r"[\s$)]{0,9}(?:[+×÷·⋅√∛∜][\s$(]{0,9}[\w\\]|\s{0,9}[\u00bc-\u00be\u2150-\u215e]|\s\d"
    r"|[-*/^][\s$(]{0,9}(?:\d|[b-zB-HJ-Z](?![A-Za-z])|\\))"
)
"""A number before it is the first term of an expression: `13 - x`, `12-13`, `2 ⅝`."""
NUMBER = re.compile(r"\s*[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s*")
DENIED = re.compile(
    rf"(?:(?:{DENIAL.pattern}"
    r"|\b(?:up to|by one|square|cube|root|sqrt|log|ln|before|after|times)\b)[\s$*(]{0,9}"
    r"(?:(?:be|is|are|equal|exactly|to|of|from|by|it|that|the|say|think|answer)\b[\s$*:]{0,9}){0,4}"
    r"|(?<!answer)[<>≤≥≠≈~±]\s*=?[\s$]{0,9}|!=[\s$]{0,9}|[√∛∜][\s$(]{0,9}"
    r"|\\(?:n?eq|ne|[lg]eq?|[lg]t|approx|sim|pm|mp)\s*)$",
    re.IGNORECASE,
)
"""Text before a number which shows that the number is not the answer: `it is not 122`, `less than
122`, `half of 122`, `x < 122`."""
GROUPING = re.compile(r"[$,]|(?<=\d) (?=\d{3}(?![\d/]))")
"""Dollar signs, and what separates thousands."""
EMPHASIS = "*_` "
EMPHASISED = re.compile(r"(?<![\w)*])\*\*([^*\n]+)\*\*(?![\w(*])")
MAX_LINE_CHARS = 2_000


def read_answer(
    response: str,
    reading: str = "strict",
    *,
    opened: bool = False,
    plain_line: bool = False,
    numeric: bool = False,
) -> Extraction:
    r"""Return the final answer of a response, read as `reading` says, after its chain of thought.

    reading: "strict" is `answer.extract`, with `plain_line`. "tags" is the one `<answer>` block.
    "boxed" is the last `\boxed{}`. "last" is the text after `####` or "answer is" in the last line
    that is not blank; if the truth is `numeric` (`is_number`), the last number of that text. "auto"
    is the first of tags, boxed and last that is present. A box outside of tags is no answer where
    the text beside it changes or denies it (`box.changes_box`).
    opened: whether the prompt ended with `<think>`.
    Linear in the length of the response. Raises ValueError for another reading."""
    if reading not in READINGS:
        raise ValueError(f"rewards.answer: {reading!r} is none of {', '.join(READINGS)}")
    if reading == "strict":
        return _unchanged(extract(response, opened=opened, plain_line=plain_line))
    visible = after_thought(without_special_tokens(response), opened)
    if visible is None:
        return OPEN_THOUGHT
    for name, find in FINDERS.items():
        if reading in (name, "auto") and (found := find(visible, numeric)) is not None:
            return _unchanged(found)
    return Extraction(None, f"no answer found: {ABSENT.get(reading, 'the response is empty')}")


def is_number(truth: object) -> bool:
    """Return whether a truth is one number, written in digits."""
    return NUMBER.fullmatch(str(truth)) is not None


def _unchanged(found: Extraction) -> Extraction:
    """Return `found`, or no answer where the text beside its box changes the box."""
    if found.text is None or not changes_box(found.around):
        return found
    box = shorten(found.text)
    return Extraction(None, f"no answer found: what is beside the box of {box} changes it")


def _tagged(visible: str, numeric: bool) -> Extraction | None:
    found = in_tags(visible)
    return found and Extraction(found.text, found.reason, "in its tags")


def _boxed(visible: str, numeric: bool) -> Extraction | None:
    content = last_boxed(visible)
    return None if content is None else present(content, "in its box", around=visible)


def _last(visible: str, numeric: bool) -> Extraction | None:
    line = last_line(visible.rstrip())
    if not line.strip():
        return None
    if len(line) > MAX_LINE_CHARS:
        return Extraction(None, f"no answer found: the last line has {len(line)} characters")
    if (content := last_boxed(line)) is not None:
        return present(content, "in the last line", around=visible)
    _, marked, answer = line.rpartition(MARKER)
    if marked:
        return present(answer, "in the last line")
    line = EMPHASISED.sub(r"\1", line)
    if numeric:
        line = SIGN_APART.sub(r"\1\2", line.translate(SIGNS))
    stated = after_answer_is(line) or line
    if numeric:
        return _last_number(stated) or present(stated, "in the last line")
    whole = stated.strip(EMPHASIS)
    return present(whole.removesuffix(".").rstrip(EMPHASIS) or whole, "in the last line")


def _last_number(text: str) -> Extraction | None:
    numbers = list(LAST_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    before = text[: last.start()]
    if DENIED.search(before) or CHANGED.match(text, last.end()):
        return Extraction(None, f"no answer found: the last line denies {last[0]}")
    if len(numbers) > 1 and JOINED.search(before):
        pair = shorten(text[numbers[-2].start() : last.end()])
        return Extraction(None, f"no answer found: two numbers end the last line: {pair}")
    has_sign = last[0][0] in "+-" and SIGNED_TERM_BEFORE.search(before)
    if has_sign or TERM_BEFORE.search(before) or TERM_AFTER.match(text, last.end()):
        return Extraction(None, f"no answer found: {last[0]} is part of an expression")
    return present(GROUPING.sub("", last[0]), "in the last line")


FINDERS: dict[str, Callable[[str, bool], Extraction | None]] = {
    "tags": _tagged,
    "boxed": _boxed,
    "last": _last,
}
ABSENT = {"tags": "there is no <answer> block", "boxed": r"there is no \boxed{}"}
