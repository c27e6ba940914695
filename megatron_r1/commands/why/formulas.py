"""Rewards, advantages, mini-batches and learning rates in float64, written from their definitions
and not from the trainer's code, which they are compared with.

    training reward = reward - penalty × punishment of the length (arXiv 2503.14476, eq. 13)
    A_i = (r_i - mean(r)) / (std(r) + ε) over a group (arXiv 2402.03300, section 4.1)"""

import math
from collections.abc import Sequence

import numpy as np

ALGORITHMS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "reinforce")
"""Whose tokens all have their response's advantage."""
EQUAL_REWARDS = 1e-9
"""Relative: two sums of the same terms in another order are further apart than their rounding."""


def training_reward(
    reward: float | None, num_tokens: int, limit: int, buffer: float, penalty: float
) -> float | None:
    """Return the reward that is trained on.

    Args:
        reward: the response's; None: ungraded.
        num_tokens: its length.
        limit: the longest response.
        buffer: the fraction of the limit over which the punishment grows to 1.
        penalty: its weight."""
    if reward is None or not buffer:
        return reward
    begin = (1 - buffer) * limit
    return reward - penalty * min(1.0, max(0.0, (num_tokens - begin) / (buffer * limit)))


def advantages(
    groups: Sequence[Sequence[float | None]], algorithm: str, std: str, epsilon: float
) -> list[list[float]]:
    """Return an advantage per response; NaN for an ungraded one.

    Args:
        groups: training rewards; None: ungraded.
        algorithm: one of `ALGORITHMS`.
        std: what is divided by: "group", "batch" or "none".
        epsilon: added to the deviation."""
    values = [np.array([np.nan if r is None else r for r in group]) for group in groups]
    whole = np.concatenate(values)
    if algorithm == "reinforce":
        mean = np.nanmean(whole) if not np.isnan(whole).all() else 0.0
        centred = [each - mean for each in values]
    else:
        centred = [each - np.nanmean(each) if not np.isnan(each).all() else each for each in values]
    if algorithm == "reinforce" and _are_equal(whole):
        centred = [each * 0.0 for each in centred]
    elif algorithm != "reinforce":
        pairs = zip(values, centred, strict=True)
        centred = [each * 0.0 if _are_equal(own) else each for own, each in pairs]
    if std == "group" and algorithm != "reinforce":
        centred = [
            each / (np.nanstd(each) + epsilon) if np.nansum(np.abs(each)) else each
            for each in centred
        ]
    if std == "batch" and not _are_equal(np.concatenate(centred)):
        scale = np.nanstd(np.concatenate(centred)) + epsilon
        centred = [each / scale for each in centred]
    return [each.tolist() for each in centred]


def _are_equal(values: np.ndarray) -> bool:
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return True
    return float(known.max() - known.min()) <= EQUAL_REWARDS * max(1.0, float(np.abs(known).max()))


def learning_rate(
    update: int,
    total: int,
    *,
    highest: float,
    lowest: float,
    warmup: int,
    decay: str,
) -> float:
    """Return the learning rate of an update.

    Args:
        update: from 1.
        total: updates of the run.
        highest: after the warm-up.
        lowest: at the end of the decay.
        warmup: updates of linear growth.
        decay: "constant", "linear" or "cosine"."""
    if update <= warmup:
        return highest * update / warmup
    if decay == "constant":
        return highest
    done = min(1.0, (update - warmup) / max(1, total - warmup))
    left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lowest + (highest - lowest) * left


def kl_of_difference(difference: np.ndarray) -> float:
    """Return the mean of e^g - g - 1, an estimate of KL, for g = log(other) - log(sampler)."""
    g = np.clip(difference.astype(np.float64), -20, 20)
    return float((np.expm1(g) - g).mean()) if len(g) else 0.0
