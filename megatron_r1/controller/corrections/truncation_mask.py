"""`rl.truncated: mask`: responses that are cut off are left out (overlong filtering: DAPO, arXiv
2503.14476, section 3.4).

    J = the algorithm's, over the responses i that ended by themselves

A response that is cut off at its limit of tokens may have been on a good way: its reward says
little about the text that is there. Left out, it is excluded from the sums and the denominators of
policy, KL, entropy and critic, as an ungraded one is (`advantages.nan_where_ungraded`). Its reward
still counts in the baseline of its group and of the rollout: the source masks the loss, and the
other responses are compared with all that were sampled. `rl.overlong_buffer` still penalizes
lengths near the limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1.controller.rollouts.rollout import Group


def mask_truncated(advantages: list[list[float]], groups: list[Group]) -> list[list[float]]:
    """Return `advantages` with NaN, which means not trained on, for each response that was cut off.

    Args:
        advantages: one per response, a list per group.
        groups: the responses, in the same order. An episode is cut off where it ended at a limit
            of tokens."""
    return [
        [
            math.nan if graded.is_truncated else advantage
            for advantage, graded in zip(group_advantages, group.responses, strict=True)
        ]
        for group_advantages, group in zip(advantages, groups, strict=True)
    ]
