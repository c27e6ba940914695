"""Reads a response's final answer, in whichever way `rewards.reading` names.

`strict` is DeepSeek-R1-Zero's: a policy learns the form in which it answers. Models that were
trained before, on forms of their own, are graded by where they put their answers: in a box, or in
the last line, as "The sum of 59 and 63 is 122."."""

import re
from collections.abc import Callable
from typing import Literal, get_args

from r1_grading.base.errors import shorten
from r1_grading.reading.context import after_answer_is, changes_box
from r1_grading.reading.last_number import last_number, with_plain_signs
from r1_grading.reading.marked_answer import marked_answer
from r1_grading.reading.scaled_numbers import with_scales
from r1_grading.reading.tags_and_boxes import (
    MARKER,
    OPEN_THOUGHT,
    Extraction,
    after_thought,
    extract_answer,
    last_boxed,
    last_line_or_formula,
    make_extraction,
    tagged_answer,
    without_special_tokens,
)
from r1_grading.rewards import REWARD_KINDS

Reading = Literal["strict", "tags", "boxed", "last", "auto"]
READINGS: tuple[str, ...] = get_args(Reading)
READING_REWARDS = tuple(name for name, kind in REWARD_KINDS.items() if kind.reads_answer)
"""The rewards whose option `reading` `rewards.reading` sets."""
NUMERIC_TRUTH = re.compile(r"\s*[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s*")
"""A truth that is one number in digits (`is_number`)."""
EMPHASIS_CHARS = "*_` "
EMPHASIZED = re.compile(r"(?<![\w)*])\*\*([^*\n]+)\*\*(?![\w(*])")
MAX_LINE_CHARS = 2_000
CLOSING_LINE = re.compile(
    r"(?:does (?:this|that) (?:make sense|help)|let me know|(?:i )?hope (?:this|that|it)"
    r"|(?:please )?feel free|is there anything|would you like|do you (?:have|want|need)"
    r"|if you (?:have|need|want))\b[^\d\\]{0,200}",
    re.IGNORECASE,
)
MAX_CLOSING_LINES = 3


def read_answer(
    response: str,
    reading: Reading = "strict",
    *,
    thought_opened: bool = False,
    reads_last_line: bool = False,
    numeric: bool = False,
) -> Extraction:
    r"""Return the final answer of a response, read as `reading` says, after its chain of thought.

    An answer that is marked before closing prose (`marked_answer.marked_answer`) is read instead of
    the last line. A box outside of tags is no answer where the text next to it changes or denies it
    (`context.changes_box`). The time is linear in the length of the response.

    Args:
        response: the text that the policy sampled.
        reading: "strict" is `extract_answer`, with `reads_last_line`. "tags" is the one
            `<answer>` block. "boxed" is the last `\boxed{}`. "last" is the text after `####` or
            "answer is" in the last line that is not blank; if the truth is `numeric`, the last
            number of that text. "auto" is the first of tags, boxed and last that is present.
        thought_opened: whether the prompt ended with `<think>`.
        reads_last_line: whether "strict" also reads a last line that is the answer.
        numeric: whether the truth is one number (`is_number`).

    Returns:
        The answer's text, or None with the reason why there is none.

    Raises:
        ValueError: another reading."""
    if reading not in READINGS:
        raise ValueError(f"rewards.reading: {reading!r} is not one of {', '.join(READINGS)}")
    visible_text = after_thought(without_special_tokens(response), thought_opened)
    if visible_text is None:
        return OPEN_THOUGHT
    if reading == "strict":
        is_line = (
            reads_last_line
            and tagged_answer(visible_text) is None
            and last_boxed(visible_text) is None
        )
        marked_extraction = marked_answer(visible_text, numeric) if is_line else None
        return _reject_changed_box(
            marked_extraction
            or extract_answer(
                response, thought_opened=thought_opened, reads_last_line=reads_last_line
            )
        )
    for name, find in FINDERS.items():
        if reading in (name, "auto") and (extraction := find(visible_text, numeric)) is not None:
            return _reject_changed_box(extraction)
    return Extraction(
        None, f"no answer found: {ABSENCE_REASONS.get(reading, 'the response is empty')}"
    )


def without_closing(text: str) -> str:
    """Return a text without last lines that only close it: `Does that make sense?`."""
    text = text.rstrip()
    for _ in range(MAX_CLOSING_LINES):
        text_before, _, line = text.rpartition("\n")
        if not text_before.strip() or not CLOSING_LINE.fullmatch(line.strip()):
            break
        text = text_before.rstrip()
    return text


def is_number(truth: object) -> bool:
    """Return whether a truth is one number, written in digits."""
    return NUMERIC_TRUTH.fullmatch(str(truth)) is not None


def _reject_changed_box(extraction: Extraction) -> Extraction:
    """Return `extraction`, or no answer where the text next to its box changes the box."""
    if extraction.text is None or not changes_box(extraction.around):
        return extraction
    box = shorten(extraction.text)
    return Extraction(None, f"no answer found: the text next to the box of {box} changes it")


def _extract_tagged(visible: str, truth_is_number: bool) -> Extraction | None:
    extraction = tagged_answer(visible)
    if extraction is None:
        return None
    return Extraction(extraction.text, extraction.reason, "in its tags")


def _extract_boxed(visible: str, truth_is_number: bool) -> Extraction | None:
    content = last_boxed(visible)
    return None if content is None else make_extraction(content, "in its box", around=visible)


def _last_number(visible: str, truth_is_number: bool) -> Extraction | None:
    line = last_line_or_formula(without_closing(visible))
    if not line.strip():
        return None
    marked_extraction = marked_answer(visible, truth_is_number)
    if len(line) > MAX_LINE_CHARS:
        return marked_extraction or Extraction(
            None, f"no answer found: the last line has {len(line)} characters"
        )
    if (content := last_boxed(line)) is not None:
        return make_extraction(content, "in the last line", around=visible)
    if marked_extraction is not None:
        return marked_extraction
    _, marker, answer = line.rpartition(MARKER)
    if marker:
        return make_extraction(answer, "in the last line")
    line = EMPHASIZED.sub(r"\1", line)
    if truth_is_number:
        line = with_scales(with_plain_signs(line))
    answer_text = after_answer_is(line) or line
    if truth_is_number:
        return last_number(answer_text) or make_extraction(answer_text, "in the last line")
    words = answer_text.strip(EMPHASIS_CHARS)
    return make_extraction(
        words.removesuffix(".").rstrip(EMPHASIS_CHARS) or words, "in the last line"
    )


FINDERS: dict[str, Callable[[str, bool], Extraction | None]] = {
    "tags": _extract_tagged,
    "boxed": _extract_boxed,
    "last": _last_number,
}
ABSENCE_REASONS = {"tags": "there is no <answer> block", "boxed": r"there is no \boxed{}"}
