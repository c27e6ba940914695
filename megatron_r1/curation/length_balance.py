"""Preference pairs whose lengths say nothing about which response is the better one.

DeepSeek-R1 sees to it that over the whole data set chosen and rejected responses are of comparable
length (arXiv 2501.12948 v2, helpful reward model). The measure here is the mean of

    d = log(length of chosen / length of rejected)

A Bradley-Terry model that sees the log of the length alone, with one weight w, has the loss
-Σ log sigmoid(w d); its slope at w = 0 is -½ Σ d, and it is convex. So where the mean of d is 0,
length is of no use to it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

Pair = TypeVar("Pair", bound=Hashable)


def log_ratio(chosen: str, rejected: str) -> float:
    """d in characters; an empty text counts as one character."""
    return math.log(max(1, len(chosen)) / max(1, len(rejected)))


def pairs_to_drop(log_ratios: Mapping[Pair, float], max_bias: float) -> set[Pair]:
    """Pairs without which the mean of d is within ±`max_bias`, few of them: always the one that
    brings the sum nearest to 0, which is the most one-sided one as long as the sum is large."""
    by_ratio = sorted(log_ratios, key=lambda pair: log_ratios[pair])
    ratios = [log_ratios[pair] for pair in by_ratio]
    total = math.fsum(ratios)
    dropped: set[Pair] = set()
    while ratios and abs(total) > max_bias * len(ratios):
        above = bisect.bisect_left(ratios, total)
        near = [place for place in (above - 1, above) if 0 <= place < len(ratios)]
        place = min(near, key=lambda place: abs(total - ratios[place]))
        dropped.add(by_ratio.pop(place))
        total -= ratios.pop(place)
    return dropped
