"""CISPO: clipped importance-sampling-weight policy optimization (MiniMax-M1, arXiv 2506.13585,
section 3.1).

    J = 1/Σ_i |o_i| Σ_i Σ_t sg(clip(ρ, 1 - ε_low, 1 + ε_high)) A log π_θ,  A as GRPO's

sg: no gradient goes through it. PPO's clip silences a token, often a rare one where reasoning
turns; here its weight is bounded and every token keeps its gradient. The weight has no lower bound
(ε_low above 1), and there is no KL; groups without a difference and long outputs are treated as
DAPO does. The source gives no ε_high: 4, a weight of 5, is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_r1.rl.algorithms import grpo
from megatron_r1.rl.algorithms.grpo import advantages

if TYPE_CHECKING:
    from megatron_r1.training.head import Head
    from megatron_r1.training.losses import LossTerms
    from megatron_r1.training.packed import PackedBatch

__all__ = ["LOSS", "advantages", "loss"]

LOSS = "megatron_r1.rl.algorithms.cispo:loss"


def loss(batch: PackedBatch, head: Head, settings: dict[str, Any]) -> LossTerms:
    """-J; `clip_fraction` counts tokens whose weight the clip holds. settings: as GRPO's."""
    return grpo.loss(batch, head, {**settings, "objective": "cispo"})
