"""Balance of lengths in preference pairs, so that length does not predict the preferred response.

DeepSeek-R1 keeps chosen and rejected responses of comparable length over the whole data set (arXiv
2501.12948 v2, helpful reward model). The measure here is the mean of

    d = log(length of chosen / length of rejected)

A Bradley-Terry model whose only feature is the log of the length, with weight w, has the convex
loss -Σ log sigmoid(w d), with slope -½ Σ d at w = 0. So at a mean of 0 it learns nothing.
"""

import bisect
import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

Pair = TypeVar("Pair", bound=Hashable)


def log_ratio(chosen: str, rejected: str) -> float:
    """Return d from lengths in characters; an empty text counts as one character."""
    return math.log(max(1, len(chosen)) / max(1, len(rejected)))


def pairs_to_drop(log_ratios: Mapping[Pair, float], max_bias: float) -> set[Pair]:
    """Return pairs without which the mean of d is within ±`max_bias`. They are few: each in turn is
    the one whose removal leaves the sum nearest to 0, which is the most one-sided pair while the
    sum is large."""
    by_ratio = sorted(log_ratios, key=lambda pair: log_ratios[pair])
    ratios = [log_ratios[pair] for pair in by_ratio]
    total = math.fsum(ratios)
    dropped: set[Pair] = set()
    while ratios and abs(total) > max_bias * len(ratios):
        above = bisect.bisect_left(ratios, total)
        near = [i for i in (above - 1, above) if 0 <= i < len(ratios)]
        nearest = min(near, key=lambda i: abs(total - ratios[i]))
        dropped.add(by_ratio.pop(nearest))
        total -= ratios.pop(nearest)
    return dropped
