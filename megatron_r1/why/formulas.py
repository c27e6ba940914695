"""Computes rewards, advantages, mini-batches and learning rates in float64. The formulas are
written from their definitions and not from the trainer's code, which they are compared with.

    training reward = reward - penalty × punishment of the length (arXiv 2503.14476, eq. 13)
    A_i = (r_i - mean(r)) / (std(r) + ε) over a group (arXiv 2402.03300, section 4.1)"""

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_r1.config.algorithms import AlgorithmRules, Baseline

REWARD_ROUNDING = 1e-9
"""The largest relative distance of equal rewards: sums of the same terms in another order differ by
rounding, which is smaller."""


def expected_training_reward(
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


def recomputed_advantages(
    groups: Sequence[Sequence[float | None]],
    rules: AlgorithmRules,
    std: str,
    epsilon: float,
    *,
    is_centered: bool = True,
    ddof: int = 0,
) -> list[list[float]]:
    """Return an advantage per response; NaN for an ungraded one.

    Args:
        groups: training rewards; None: ungraded.
        rules: those of an algorithm with a `recomputed_baseline`.
        std: what is divided by: "group", "batch" or "none". Advantages of tokens are divided by
            `update.token_advantages`, and a rollout's baseline has no deviation of a group.
        epsilon: added to the deviation.
        is_centered: whether the mean is subtracted.
        ddof: the deviation divides by the number of rewards less `ddof`."""
    baseline = rules.recomputed_baseline
    assert baseline is not None, "the algorithm is not recomputed"
    rewards = [np.array([np.nan if r is None else r for r in group]) for group in groups]
    if rules.kl_in_reward or (baseline == "rollout" and std == "group"):
        std = "none"
    scaled_advantages = scale_advantages(
        _subtract_baseline(rewards, baseline, is_centered), std, epsilon, ddof
    )
    return [group_advantages.tolist() for group_advantages in scaled_advantages]


def _subtract_baseline(
    rewards: Sequence[np.ndarray], baseline: Baseline, is_centered: bool
) -> Sequence[np.ndarray]:
    """Return rewards less their baseline, with zeros where those that it compares are equal."""
    if baseline == "none":
        return rewards
    if baseline == "others":
        centered_rewards = subtract_other_mean(rewards)
    elif not is_centered:
        centered_rewards = list(rewards)
    elif baseline == "rollout":
        centered_rewards = subtract_rollout_mean(rewards)
    else:
        centered_rewards = subtract_group_mean(rewards)
    if baseline == "rollout":
        is_equal = [are_equal(np.concatenate(rewards))] * len(rewards)
    else:
        is_equal = [are_equal(group_rewards) for group_rewards in rewards]
    return [
        group_advantages * 0.0 if is_zero else group_advantages
        for is_zero, group_advantages in zip(is_equal, centered_rewards, strict=True)
    ]


def subtract_group_mean(rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return r_i - mean(r) over each group (arXiv 2402.03300, section 4.1); NaN (ungraded) is
    ignored."""
    return [
        group_rewards
        if np.isnan(group_rewards).all()
        else group_rewards - np.nanmean(group_rewards)
        for group_rewards in rewards
    ]


def subtract_rollout_mean(rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return r_i - mean(r) over the responses of all groups; NaN (ungraded) is ignored."""
    all_rewards = np.concatenate(rewards)
    mean = 0.0 if np.isnan(all_rewards).all() else np.nanmean(all_rewards)
    return [group_rewards - mean for group_rewards in rewards]


def subtract_other_mean(rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return r_i - Σ_{j≠i} r_j / (n - 1) over each group of n, the leave-one-out baseline of RLOO
    (arXiv 2402.14740, section 3); NaN (ungraded) is ignored."""
    centered_rewards = []
    for group_rewards in rewards:
        num_others = np.sum(~np.isnan(group_rewards)) - 1
        other_sums = np.nansum(group_rewards) - group_rewards
        centered_rewards.append(group_rewards - other_sums / max(1, num_others))
    return centered_rewards


def scale_advantages(
    centered_rewards: Sequence[np.ndarray], std: str, epsilon: float, ddof: int
) -> Sequence[np.ndarray]:
    """Return A_i / (std(A) + ε) over each group or the batch; advantages that are all 0, and a
    batch of equal ones, stay.

    Args:
        centered_rewards: rewards less their baseline, by group.
        std: as of `recomputed_advantages`, like the next two.
        epsilon: added to the deviation.
        ddof: the deviation divides by the number of rewards less `ddof`."""
    if std == "group":
        return [
            group_advantages / (np.nanstd(group_advantages, ddof=ddof) + epsilon)
            if np.nansum(np.abs(group_advantages))
            else group_advantages
            for group_advantages in centered_rewards
        ]
    if std == "batch" and not are_equal(np.concatenate(centered_rewards)):
        scale = np.nanstd(np.concatenate(centered_rewards), ddof=ddof) + epsilon
        return [group_advantages / scale for group_advantages in centered_rewards]
    return centered_rewards


def reward_term_advantages(
    rewards: Mapping[str, Sequence[Sequence[float | None]]],
    weights: Mapping[str, float],
    rules: AlgorithmRules,
    std: str,
    epsilon: float,
) -> list[list[float]]:
    """Return advantages of rewards that are each normalized alone (GDPO, arXiv 2601.05242).

    Args:
        rewards: by reward and group; None: ungraded.
        weights: the weight of each reward.
        rules: as of `recomputed_advantages`, like the next two.
        std: what is divided by.
        epsilon: added to the deviation."""
    parts = {
        name: recomputed_advantages(term_rewards, rules, std, epsilon)
        for name, term_rewards in rewards.items()
    }
    groups = range(len(next(iter(rewards.values()))))
    sums = [
        np.sum([weights[name] * np.array(part[index]) for name, part in parts.items()], axis=0)
        for index in groups
    ]
    all_sums = np.concatenate(sums)
    if are_equal(all_sums):
        return [(group_sums * 0.0).tolist() for group_sums in sums]
    mean, scale = np.nanmean(all_sums), np.nanstd(all_sums) + epsilon
    return [((group_sums - mean) / scale).tolist() for group_sums in sums]


def are_equal(values: np.ndarray) -> bool:
    """Return whether rewards differ by rounding alone; NaN (ungraded) is ignored."""
    numbers = values[~np.isnan(values)]
    if len(numbers) < 2:
        return True
    return float(numbers.max() - numbers.min()) <= REWARD_ROUNDING * max(
        1.0, float(np.abs(numbers).max())
    )


def expected_learning_rate(
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
    fraction = min(1.0, (update - warmup) / max(1, total - warmup))
    remaining = 1 - fraction if decay == "linear" else (1 + math.cos(math.pi * fraction)) / 2
    return lowest + (highest - lowest) * remaining


def question_order(num_questions: int, seed: int, first: int, count: int) -> list[int]:
    """Return the numbers of the questions that a run draws: epochs of all, each shuffled by the
    seed and its number.

    Args:
        num_questions: those to train on.
        seed: `run.seed`.
        first: how many were drawn before.
        count: how many are drawn."""
    numbers: list[int] = []
    for epoch in range(first // num_questions, (first + count - 1) // num_questions + 1):
        order = list(range(num_questions))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        begin = epoch * num_questions
        numbers += order[max(0, first - begin) : max(0, first + count - begin)]
    return numbers


def kl_of_difference(difference: np.ndarray) -> float:
    """Return the mean of e^g - g - 1, an estimate of KL, for g = log(other) - log(sampler)."""
    g = np.clip(difference.astype(np.float64), -20, 20)
    return float((np.expm1(g) - g).mean()) if len(g) else 0.0
