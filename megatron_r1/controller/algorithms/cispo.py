"""CISPO: clipped importance-sampling-weight policy optimization (MiniMax-M1, arXiv 2506.13585,
section 3.1).

    J = 1/Σ_i |o_i| Σ_i Σ_t sg(clip(ρ, 1 - ε_low, 1 + ε_high)) A_i log π_θ,  A as GRPO's

sg stops the gradient. PPO's clip removes the gradient of a token, often a rare one at which the
reasoning turns; here its weight is bounded and every token keeps its gradient. Averaged per token.
The weight has no lower bound (ε_low above 1) and there is no KL; equal-reward groups and long
responses are treated as in DAPO. The source gives no ε_high: 4, a weight of 5, is ours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.controller.algorithms import grpo

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import PackedMicrobatch
    from megatron_r1.trainer.loss_head import LossHead
    from megatron_r1.trainer.losses import LossSum


def loss(batch: PackedMicrobatch, head: LossHead, settings: LossSettings) -> LossSum:
    """Return -J; `clip_fraction` counts the tokens whose weight is clipped.

    Args:
        batch: the packed samples.
        head: the model's output layer.
        settings: as GRPO's."""
    settings = LossSettings.of(settings)
    return grpo.loss(batch, head, replace(settings, objective="cispo"))
