"""Advantages of a step's responses, by this command's own formulas of their logged rewards."""

import math
from collections.abc import Sequence

from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.why import formulas

GroupRewards = list[list[float | None]]
"""The rewards that are trained on, by group; None for an ungraded response."""


def group_rewards(groups: Sequence[Group], config: Config, overlong_penalty: float) -> GroupRewards:
    """Return the rewards by group, None for an ungraded response, less a penalty of long
    responses.

    Args:
        groups: those that are trained on.
        config: the settings at their step.
        overlong_penalty: its largest value, in place of `rl.overlong_penalty`."""
    rl, limit = config.rl, config.rollout.max_response_tokens
    return [
        [
            formulas.training_reward(
                graded.reward if graded.is_graded else None,
                len(graded.response.token_ids),
                limit,
                rl.overlong_buffer,
                overlong_penalty,
            )
            for graded in group.responses
        ]
        for group in groups
    ]


def response_advantages(
    groups: Sequence[Group],
    config: Config,
    training_rewards: GroupRewards,
    reward_weights: dict[str, float],
) -> list[list[float]]:
    """Return advantages by this command's own formulas; NaN: not trained on.

    They are zeros for an algorithm whose rules have no `recomputed_baseline`.

    Args:
        groups: those that are trained on.
        config: the settings at their step.
        training_rewards: the rewards that advantages are made of.
        reward_weights: the weight of each reward in the step."""
    rl, rules = config.rl, find_rules(config.rl.algorithm)
    if rules.recomputed_baseline is None:
        by_group = [[0.0] * len(rewards) for rewards in training_rewards]
    elif rl.reward_normalization == "each":
        by_group = formulas.reward_term_advantages(
            *_reward_terms(groups, config, reward_weights),
            rules,
            rl.advantage_std,
            rl.advantage_epsilon,
        )
    else:
        by_group = formulas.advantages(
            training_rewards, rules, rl.advantage_std, rl.advantage_epsilon
        )
    if rl.truncated == "mask":
        for group_advantages, group in zip(by_group, groups, strict=True):
            group_advantages[:] = [
                math.nan if graded.is_truncated else a
                for a, graded in zip(group_advantages, group.responses, strict=True)
            ]
    return by_group


def _reward_terms(
    groups: Sequence[Group], config: Config, reward_weights: dict[str, float]
) -> tuple[dict[str, GroupRewards], dict[str, float]]:
    """Return the rewards by name and group, with that of the length, and their weights.

    Args:
        groups: those that are trained on.
        config: the settings at their step.
        reward_weights: the weight of each reward in the step."""
    rl, limit = config.rl, config.rollout.max_response_tokens
    weights = reward_weights
    rewards: dict[str, GroupRewards] = {
        name: [
            [graded.rewards[name] if graded.is_graded else None for graded in group.responses]
            for group in groups
        ]
        for name in weights
    }
    if rl.overlong_buffer:
        weights = {**weights, "": rl.overlong_penalty}
        rewards[""] = [
            [
                formulas.training_reward(
                    0.0 if graded.is_graded else None,
                    len(graded.response.token_ids),
                    limit,
                    rl.overlong_buffer,
                    1.0,
                )
                for graded in group.responses
            ]
            for group in groups
        ]
    return rewards, weights
