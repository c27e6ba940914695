"""`rl.reward_normalization: each`: normalize every reward by itself (GDPO: group reward-decoupled
normalization policy optimization, arXiv 2601.05242).

    A_n,i = (r_n,i - mean(r_n)) / (std(r_n) + ε) of the group, for each reward n
    S_i   = Σ_n w_n A_n,i,  w_n the weight of reward n in `rewards.weights`
    A_i   = (S_i - mean(S)) / (std(S) + ε), over the responses of the rollout

Normalized as a sum, responses that differ in their rewards may get the same advantage, and a reward
that varies much hides one that varies little. Normalized alone, each counts by its weight. The last
line keeps the size of a step, whatever the number of rewards.

A_n is what the algorithm makes of reward n, so that this is for algorithms that divide by the
group's deviation (`advantage_std` group): without it the sum of advantages is the advantage of the
sum. The penalty of `rl.overlong_buffer` is a reward of its own, whose weight is
`rl.overlong_penalty`. An ungraded response has no reward at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from r1_grading.terms import rewards_equal

from megatron_r1.controller.corrections.overlong_penalty import overlong_penalty

if TYPE_CHECKING:
    from megatron_r1.config import Config, RLConfig
    from megatron_r1.controller.rollouts.rollout import GradedResponse, Group

PENALTY = ""
"""The name of the penalty of long responses among the rewards."""


def advantages(
    groups: list[Group],
    algorithm_advantages: Callable[[list[list[float | None]], RLConfig], list[list[float]]],
    config: Config,
    weights: Mapping[str, float],
) -> list[list[float]]:
    """Return A_i, one per response, a list per group; NaN for an ungraded response.

    Args:
        groups: the graded responses.
        algorithm_advantages: the algorithm's advantages of one reward.
        config: the settings of the step.
        weights: the weight of each reward in the step."""
    rl, limit = config.rl, config.rollout.max_response_tokens

    def reward(graded: GradedResponse, name: str) -> float:
        if name != PENALTY:
            return graded.rewards[name]
        return overlong_penalty(len(graded.response.token_ids), limit, rl.overlong_buffer)

    if rl.overlong_buffer:
        weights = {**weights, PENALTY: rl.overlong_penalty}
    sums = [[0.0] * len(group.responses) for group in groups]
    for name, weight in weights.items():
        rewards = [
            [reward(graded, name) if graded.is_graded else None for graded in group.responses]
            for group in groups
        ]
        pairs = zip(sums, algorithm_advantages(rewards, rl), strict=True)
        sums = [[s + weight * a for s, a in zip(*pair, strict=True)] for pair in pairs]
    return normalize_values(sums, rl.advantage_epsilon)


def normalize_values(values: list[list[float]], epsilon: float) -> list[list[float]]:
    """Return the values with mean 0 and deviation 1 over all that are not NaN; where these are all
    equal, zeros.

    Args:
        values: a list per group.
        epsilon: added to the population's standard deviation."""
    graded_values = [value for value in chain(*values) if not math.isnan(value)]
    if rewards_equal(graded_values):
        return [
            [value if math.isnan(value) else 0.0 for value in group_values]
            for group_values in values
        ]
    mean, scale = fmean(graded_values), pstdev(graded_values) + epsilon
    return [[(value - mean) / scale for value in group_values] for group_values in values]
