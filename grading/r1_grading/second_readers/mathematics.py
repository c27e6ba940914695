"""The second reader of mathematics: math-verify, and values at random points (`formulas`).

Each says right, wrong, or that it is not sure; `read` returns both. math-verify compares
in its own way, but its parser is also the last resort of the reward, so it does not decide alone
where the two differ (docs/rewards.md)."""

import logging
import re

from math_verify import parse, verify

from r1_grading.base.errors import shorten
from r1_grading.rewards import Grade
from r1_grading.second_readers.answer_texts import parse_answer, same_answer
from r1_grading.second_readers.places import Unsure, find_answer, true_answer, visible_text
from r1_grading.truths import alternatives

RIGHT, WRONG, UNSURE = "right", "wrong", "unsure"
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def read(
    response: str,
    truth: object,
    *,
    opened: bool = False,
    reading: str = "strict",
    **entry: object,
) -> Grade:
    """Return what two methods say of a response.

    Args:
        response: the text that the policy sampled.
        truth: as of the reward `math`.
        opened: the prompt ended with `<think>`.
        reading: `rewards.answer`.
        **entry: the prompt's other fields, which are not used.

    Returns:
        A grade of 0 whose `verdict` is "math-verify's,points'", each "right", "wrong" or "unsure";
        the reason says what was read.

    Raises:
        ValueError: a truth that is blank, or not a number or string."""
    truths = [true_answer(str(each)) for each in alternatives(truth)]
    if not truths:
        raise ValueError(f"the truth of a math answer must not be empty, got {truth!r}")
    visible = visible_text(response, opened)
    try:
        answer = find_answer(visible, reading) if visible else None
    except Unsure as error:
        # Not searched by math-verify either: in prose behind an answer it takes the last number.
        return Grade(0.0, f"it is not sure of the answer: {error}", verdict=f"{UNSURE},{UNSURE}")
    if answer is None:
        return Grade(0.0, "it finds no answer", verdict=f"{WRONG},{WRONG}")
    upstream = _best([_upstream(each, answer) for each in truths])
    found = [_at_points(each, answer) for each in truths]
    points = _best([verdict for verdict, _ in found])
    why = next((reason for verdict, reason in found if verdict == points), "")
    reason = f"{shorten(answer)}: math-verify says {upstream}, values at points {points}"
    return Grade(0.0, f"{reason} ({why})" if why else reason, verdict=f"{upstream},{points}")


def _best(verdicts: list[str]) -> str:
    """Return the verdict of an answer for which any of several truths may stand."""
    return next(verdict for verdict in (RIGHT, UNSURE, WRONG) if verdict in verdicts)


def _upstream(truth: str, answer: str) -> str:
    """Return math-verify's verdict."""
    expected = _parsed(truth)
    if not expected:
        return UNSURE
    return RIGHT if verify(expected, _parsed(answer), timeout_seconds=None) else WRONG


def _parsed(text: str) -> list:
    marked = text if "$" in text or r"\(" in text or r"\[" in text else f"${text}$"
    return parse(marked, parsing_timeout=None) or parse(text, parsing_timeout=None)


def _at_points(truth: str, answer: str) -> tuple[str, str]:
    if _plain(truth) == _plain(answer):
        return RIGHT, ""
    try:
        same = same_answer(parse_answer(truth), parse_answer(answer), f"{truth}\n{answer}")
    except Unsure as error:
        return UNSURE, str(error)
    return (UNSURE if same is None else RIGHT if same else WRONG), ""


def _plain(text: str) -> str:
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text.replace("$", "")).rstrip(".")
