"""RLOO: REINFORCE with the other outputs of the question as its baseline (Back to Basics, arXiv
2402.14740, section 3; Kool et al. 2019).

    A_i,t = r_i - 1/(G - 1) Σ_{j≠i} r_j - β Σ_{s≥t} log(π_old / π_ref)_s
    J     = 1/(N L) Σ_i Σ_t ρ A_i,t,  L a constant: max_response_tokens

An output is one action, so tokens are summed, not averaged. The source has the KL penalty of the
whole output in its reward, whose expected gradient is that of KL(π_θ ‖ π_ref); what a token cannot
change, the penalties before it, is left out here, and so is the baseline of the penalty: less
variance, the same expectation. Each token's own penalty alone would be the k2 loss
(log(π_θ / π_ref)² / 2), which has that gradient too, but for what a token does to those after it.
One update per rollout, so that ρ is 1; see `reinforce`. β and G are the source's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_r1.rl.advantages import graded
from megatron_r1.rl.algorithms.grpo import LOSS

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig

__all__ = [
    "LOSS",
    "TOKEN_ADVANTAGES",
    "advantages",
]

TOKEN_ADVANTAGES = "megatron_r1.training.token_advantages:reward_to_go"


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Rewards less the mean of the group's others; 0 where these say nothing: all are equal, or
    nobody graded any of them."""
    return [_leave_one_out(rewards) for rewards in groups]


def _leave_one_out(rewards: list[float | None]) -> list[float]:
    known = graded(rewards)
    if len(set(known)) < 2:
        return [math.nan if r is None else 0.0 for r in rewards]
    total, others = sum(known), len(known) - 1
    return [math.nan if r is None else r - (total - r) / others for r in rewards]
