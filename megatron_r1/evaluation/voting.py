"""Majority vote over several answers to one question (cons@N)."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from megatron_r1.rewards.answer import extract, unwrap


def majority(responses: list[str]) -> int | None:
    """Index of the first response that gives the most frequent answer; None if none gives one.

    Answers are the same when they are the same number, or else the same text without decoration and
    case. Responses without an answer have no vote. A tie goes to the answer that came first.
    """
    votes = [_canonical(response) for response in responses]
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return None
    return votes.index(counts.most_common(1)[0][0])


def _canonical(response: str) -> str | Fraction | None:
    answer = extract(response).text
    if answer is None:
        return None
    text = unwrap(answer).replace(" ", "").lower()
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return text
