"""Advantages of responses, computed from their rewards.

Rewards and advantages are a list per group, with one number per response. The reward of a response
that could not be graded is None; means and deviations are over graded responses."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Literal

from r1_grading.terms import rewards_equal

from megatron_r1.base.errors import RunError

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig


def drop_ungraded(rewards: list[float | None]) -> list[float]:
    """Return the rewards that are not None.

    Raises:
        ValueError: the group is empty, or a reward is not finite.
    """
    if not rewards:
        raise ValueError("a group needs at least one reward")
    graded_rewards = [r for r in rewards if r is not None]
    if not all(math.isfinite(r) for r in graded_rewards):
        raise ValueError(f"rewards must be finite, got {rewards}")
    return graded_rewards


def group_advantages(
    rewards: list[float | None],
    *,
    advantage_std: Literal["group", "none"] = "group",
    epsilon: float = 1e-6,
) -> list[float]:
    """Return the group-relative advantages of the G responses to one prompt; 0 for ungraded ones.

    DeepSeekMath, arXiv 2402.03300, section 4.1.2; DeepSeek-R1, arXiv 2501.12948, eq. 3:

        A_i = (r_i - mean(r)) / (std(r) + epsilon)

    A group whose rewards are all equal (`r1_grading.terms`) has advantages of 0.

    Args:
        rewards: the rewards of the group; None: ungraded.
        advantage_std: what divides, as `rl.advantage_std`: "group" for the z-score (population
            standard deviation, the group's own root mean square), "none" to leave the scale of the
            rewards (Dr. GRPO, arXiv 2503.20783, section 3.2).
        epsilon: added to the deviation.

    Raises:
        ValueError: the group is empty, a reward is not finite, or advantage_std is another."""
    if advantage_std not in ("group", "none"):
        raise ValueError(f"advantage_std {advantage_std!r}: use group or none")
    graded_rewards = drop_ungraded(rewards)
    if rewards_equal(graded_rewards):
        return [0.0] * len(rewards)
    mean = fmean(graded_rewards)
    scale = pstdev(graded_rewards) + epsilon if advantage_std == "group" else 1.0
    return [0.0 if r is None else (r - mean) / scale for r in rewards]


def divide_by_batch_std(
    advantages: list[list[float]], rewards: list[list[float | None]], epsilon: float
) -> list[list[float]]:
    """Return A_i / (std(A) + epsilon), with the population's standard deviation over all graded
    responses of the rollout; where those are all equal, `advantages` as they are.

    Args:
        advantages: A_i, a list per group.
        rewards: the rewards in the same order; None: ungraded.
        epsilon: added to the deviation."""
    pairs = zip(chain(*advantages), chain(*rewards), strict=True)
    graded_advantages = [advantage for advantage, reward in pairs if reward is not None]
    if rewards_equal(graded_advantages):
        return advantages
    scale = pstdev(graded_advantages) + epsilon
    return [[a / scale for a in group] for group in advantages]


def response_rewards(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Return the rewards as they are, NaN for ungraded responses: for an algorithm whose trainer
    ranks compute the advantages of tokens from them.

    Args:
        groups: the rewards of each group; None: ungraded.
        rl: not used; the parameters are those of an algorithm's `advantages`.

    Raises:
        ValueError: a group is empty, or a reward is not finite."""
    for rewards in groups:
        drop_ungraded(rewards)
    return [[math.nan if r is None else r for r in rewards] for rewards in groups]


def nan_where_ungraded(
    name: str,
    advantages: Callable[[list[list[float | None]], RLConfig], list[list[float]]],
    groups: list[list[float | None]],
    rl: RLConfig,
) -> list[list[float]]:
    """Return `advantages(groups, rl)` with NaN for every ungraded response, and for no other.

    The rule of every algorithm that learns from rewards: a response without a grade is left out of
    sums and denominators, of policy, KL, entropy and critic. `pack_batch` takes no token of a
    sample with advantage NaN for a response token, and counts no response for it. Ungraded are a
    response whose reward failed, and an episode that ended for a reason that is not the policy's
    (`engines.episodes`). A response that is cut off at its limit of tokens is the policy's
    own: it is graded and trained on.

    Args:
        name: `rl.algorithm`, for the error.
        advantages: the `advantages` or `response_rewards` of an algorithm.
        groups: the rewards of each group; None: ungraded.
        rl: the settings of `rl`.

    Raises:
        RunError: what it returns for a graded response is not finite: it would be left out of
            training without a word."""
    by_group = [
        [math.nan if r is None else a for a, r in zip(*pair, strict=True)]
        for pair in zip(advantages(groups, rl), groups, strict=True)
    ]
    for index, (rewards, values) in enumerate(zip(groups, by_group, strict=True)):
        for reward, advantage in zip(rewards, values, strict=True):
            if reward is not None and not math.isfinite(advantage):
                raise RunError(
                    f"rl.algorithm: {name} returns the advantage {advantage} for a response with "
                    f"reward {reward}, in group {index} with rewards {rewards}; return a finite "
                    "number, 0 for a response that is not to be learned from"
                )
    return by_group
