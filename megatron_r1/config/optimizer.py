"""Section `optimizer`: Adam, and the learning rate of each step."""

import math
from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Scheduled, Section


class OptimizerConfig(Section):
    """Adam, its learning rate over the run, and the memory of its state."""

    learning_rate: Scheduled[float] = Field(3e-6, gt=0)
    """after warm-up (the paper: 3e-6)"""
    min_learning_rate: Scheduled[float] = Field(0.0, ge=0)
    """learning rate at the end of the decay"""
    warmup_updates: int = Field(0, ge=0)
    """linear warm-up, in updates (optimizer steps)"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """how the learning rate falls after warm-up, to min_learning_rate at the end of the run"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's decay of the gradient's mean"""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's decay of the gradient's square"""
    epsilon: float = Field(1e-8, gt=0)
    """Adam's, added to the root of the square"""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's: a step takes learning rate x this of a weight, norms and biases apart; 0: none"""
    clip_grad: float = Field(1.0, gt=0)
    """largest global norm of the gradient"""
    moments: Literal["float32", "bfloat16"] = "float32"
    """dtype of Adam's moments; bfloat16: DeepSeek-V3's, 4 bytes a parameter less"""


def learning_rate(settings: OptimizerConfig, step: int, total: int) -> float:
    """Return the rate of optimizer step `step` (from 1) of `total`.

    Linear warm-up, then a constant rate or the linear or cosine decay to the minimum.

    Args:
        settings: the recipe's section.
        step: from 1.
        total: optimizer steps of the run.
    """
    if step <= settings.warmup_updates:
        return settings.learning_rate * step / settings.warmup_updates
    if settings.decay == "constant":
        return settings.learning_rate
    progress = min(1.0, (step - settings.warmup_updates) / max(1, total - settings.warmup_updates))
    remaining_fraction = (
        1.0 - progress if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )
    lowest_rate = settings.min_learning_rate
    return lowest_rate + (settings.learning_rate - lowest_rate) * remaining_fraction


def warmup_note(settings: OptimizerConfig, total: int) -> str:
    """Return a sentence where the warm-up takes all of `total` optimizer steps, else "".

    The rate would reach its value in the last of them, or never."""
    if settings.warmup_updates < max(1, total):
        return ""
    highest_rate = learning_rate(settings, total, total)
    return (
        f"optimizer.warmup_updates: {settings.warmup_updates:,} takes all {total:,} optimizer "
        f"steps of the run, whose learning rate rises to {highest_rate:.3g} of "
        f"{settings.learning_rate:.3g}: lower it, or raise run.steps"
    )
