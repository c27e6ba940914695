"""Dynamic sampling (`rl.dynamic_sampling`): groups whose responses all have the same reward are
replaced by groups of further prompts (DAPO, arXiv 2503.14476, section 3.2).

Where the group is the baseline, a group whose responses all have the same reward has advantage 0
everywhere. Without such groups the number of samples behind a gradient stays the same while the
policy learns. Rewards are compared before `overlong_penalty`, as the paper compares accuracies. An
algorithm with another baseline (reinforce, reinforce_pp, ppo) would learn from the groups that are
filtered out."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from megatron_r1.controller.rollouts.rollout import Group, Rollout
from megatron_r1.data.prompt import Prompt


async def collect_dynamic_rollout(
    collect: Callable[[list[Prompt]], Awaitable[Rollout]],
    draw: Callable[[int], list[Prompt]],
    num_groups: int,
    max_rounds: int,
) -> Rollout:
    """Return a rollout of `num_groups` groups, those with different rewards first.

    Each round draws a prompt for every group still missing; equal-reward groups then fill the batch
    up to its size, and the rest of them are `filtered_groups`. Times are summed over the rounds.

    Args:
        collect: samples and grades a group for each prompt.
        draw: returns that many new prompts.
        num_groups: the groups of the rollout.
        max_rounds: `rl.dynamic_sampling_rounds`."""
    different_groups: list[Group] = []
    equal_groups: list[Group] = []
    rounds: list[Rollout] = []
    while len(different_groups) < num_groups and len(rounds) < max_rounds:
        rounds.append(await collect(draw(num_groups - len(different_groups))))
        for group in rounds[-1].groups:
            (equal_groups if group.has_equal_rewards else different_groups).append(group)
    num_missing = num_groups - len(different_groups)
    return replace(
        rounds[-1],
        groups=different_groups + equal_groups[:num_missing],
        filtered_groups=equal_groups[num_missing:],
        rollout_seconds=sum(r.rollout_seconds for r in rounds),
        reward_seconds=sum(r.reward_seconds for r in rounds),
        teacher_seconds=sum(r.teacher_seconds for r in rounds),
    )
