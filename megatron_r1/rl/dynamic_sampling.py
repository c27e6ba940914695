"""Groups that teach nothing are replaced by new ones (DAPO, arXiv 2503.14476, section 3.2).

A group whose outputs all have the same reward has advantage 0 everywhere. Filling the batch with
groups that differ keeps the number of samples behind a gradient the same while the policy learns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from megatron_r1.data.prompts import Prompt
from megatron_r1.rl.sampling import Collected, Group


async def collect_informative(
    collect: Callable[[list[Prompt]], Awaitable[Collected]],
    draw: Callable[[int], list[Prompt]],
    wanted: int,
    most_rounds: int,
) -> Collected:
    """`wanted` groups, those with different rewards first.

    draw: so many new prompts. Prompts are drawn again for groups without a difference, most_rounds
    times in all; what is then still missing is filled up with such groups, so that a batch has its
    size. Those left out are in `passed_over`; times and reward-worker counts are added up.
    """
    kept: list[Group] = []
    equal: list[Group] = []
    rounds: list[Collected] = []
    while len(kept) < wanted and len(rounds) < most_rounds:
        rounds.append(await collect(draw(wanted - len(kept))))
        for group in rounds[-1].groups:
            (kept if differs(group) else equal).append(group)
    missing = wanted - len(kept)
    return replace(
        rounds[-1],
        groups=kept + equal[:missing],
        passed_over=equal[missing:],
        rollout_seconds=sum(r.rollout_seconds for r in rounds),
        reward_seconds=sum(r.reward_seconds for r in rounds),
        teacher_seconds=sum(r.teacher_seconds for r in rounds),
    )


def differs(group: Group) -> bool:
    """Whether two graded outputs of `group` have different rewards."""
    return len({output.reward for output in group.outputs if output.is_graded}) > 1
