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
from megatron_r1.rewards.wording import DENIAL, after_answer_is

Reading = Literal["strict", "tags", "boxed", "last", "auto"]
READINGS: tuple[str, ...] = get_args(Reading)
READERS = ("math", "logic")
"""The rewards whose option `reading` `rewards.answer` sets."""
LAST_NUMBER = re.compile(
    r"(?<![\w.,:/^{\\+*-])[-+]?\$?(?P<number>[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?)"
    r"(?:\\?%)?(?![\w^{]|[.,:/]\d)"
)
"""A number that no letter, formula or longer number goes on from: not the 2 of x^2 or of 3.14.2."""
JOINED = re.compile(
    r"\d[\s$)]{0,9}[,;(.]?[\s$]{0,9}(?:[,;&|~^/]|(?:or|and|to|vs\.?|versus|maybe|perhaps|possibly"
    r"|(?:or|but) (?:maybe|perhaps|possibly)|times|plus|minus)\b|[-+*×÷]"
    r"|\\(?:times|cdot|div)\b)[\s$(.]{0,9}$",
    re.IGNORECASE,
)
"""What joins the last number to one before it: two candidates (`12 or 13`), or a calculation that
is not worked out and may be the question (`2 + 11`)."""
NUMBER = re.compile(r"\s*[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s*")
DENIED = re.compile(
    rf"(?:(?:{DENIAL.pattern}"
    r"|\b(?:up to|by one|square|cube|root|sqrt|log|ln|before|after|times)\b)[\s$*(]{0,9}"
    r"(?:(?:be|is|are|equal|exactly|to|of|from|by|it|that|the|say|think|answer)\b[\s$*:]{0,9}){0,4}"
    r"|(?<!answer)[<>≤≥≠≈~±]\s*=?[\s$]{0,9}|!=[\s$]{0,9}|\\(?:n?eq|ne|[lg]eq?|[lg]t|approx|sim|pm|mp)\s*)$",
    re.IGNORECASE,
)
"""What makes the number after it another one than the line's: `it is not 122`, `less than 122`,
`half of 122`, `x < 122`."""
CHANGED = re.compile(
    r"[\s$*)]{0,9}(?:[!?]*\?|\+(?=[\s$*.]*$)|-?ish\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed|less|fewer)\b"
    r"|or (?:more|less|fewer|so|maybe|perhaps|possibly)\b|\(?(?:not|un)\s?(?:sure|certain)\b"
    r"|(?:is|was)(?: (?:not|too)\b|n['’]t| (?:wrong|incorrect|false)))",
    re.IGNORECASE,
)
"""What does so after the number: `122 million`, `122 or so`, `122 is wrong`, `122 squared`,
`122?`."""
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
    is the first of tags, boxed and last that is present.
    opened: whether the prompt ended with `<think>`.
    Linear in the length of the response. Raises ValueError for another reading."""
    if reading not in READINGS:
        raise ValueError(f"rewards.answer: {reading!r} is none of {', '.join(READINGS)}")
    if reading == "strict":
        return extract(response, opened=opened, plain_line=plain_line)
    visible = after_thought(without_special_tokens(response), opened)
    if visible is None:
        return OPEN_THOUGHT
    for name, find in FINDERS.items():
        if reading in (name, "auto") and (found := find(visible, numeric)) is not None:
            return found
    return Extraction(None, f"no answer found: {ABSENT.get(reading, 'the response is empty')}")


def is_number(truth: object) -> bool:
    """Return whether a truth is one number, written in digits."""
    return NUMBER.fullmatch(str(truth)) is not None


def _tagged(visible: str, numeric: bool) -> Extraction | None:
    found = in_tags(visible)
    return found and Extraction(found.text, found.reason, "in its tags")


def _boxed(visible: str, numeric: bool) -> Extraction | None:
    content = last_boxed(visible)
    return None if content is None else present(content, "in its box")


def _last(visible: str, numeric: bool) -> Extraction | None:
    line = last_line(visible.rstrip())
    if not line.strip():
        return None
    if len(line) > MAX_LINE_CHARS:
        return Extraction(None, f"no answer found: the last line has {len(line)} characters")
    if (content := last_boxed(line)) is not None:
        return present(content, "in the last line")
    _, marked, answer = line.rpartition(MARKER)
    if marked:
        return present(answer, "in the last line")
    line = EMPHASISED.sub(r"\1", line)
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
    return present(re.sub("[$,]", "", last[0]), "in the last line")


FINDERS: dict[str, Callable[[str, bool], Extraction | None]] = {
    "tags": _tagged,
    "boxed": _boxed,
    "last": _last,
}
ABSENT = {"tags": "there is no <answer> block", "boxed": r"there is no \boxed{}"}
