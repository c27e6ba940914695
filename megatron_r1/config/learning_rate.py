"""The learning rate of each optimizer step, by the recipe's section `optimizer`."""

import math

from megatron_r1.config.training import OptimizerConfig


def learning_rate(settings: OptimizerConfig, step: int, total: int) -> float:
    """Return the rate of optimizer step `step` (from 1) of `total`: linear warm-up, then a constant
    rate or the linear or cosine decay to the minimum.

    Args:
        settings: the recipe's section.
        step: from 1.
        total: optimizer steps of the run.
    """
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    if settings.decay == "constant":
        return settings.learning_rate
    progress = min(1.0, (step - settings.warmup) / max(1, total - settings.warmup))
    left = (
        1.0 - progress if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )
    low = settings.min_learning_rate
    return low + (settings.learning_rate - low) * left


def warmup_note(settings: OptimizerConfig, total: int) -> str:
    """Return a sentence where the warm-up takes all of `total` optimizer steps, "" where it does
    not: the rate would reach its value in the last of them, or never."""
    if settings.warmup < max(1, total):
        return ""
    highest = learning_rate(settings, total, total)
    return (
        f"optimizer.warmup: {settings.warmup:,} takes all {total:,} optimizer steps of the run, "
        f"whose learning rate rises to {highest:.3g} of {settings.learning_rate:.3g}: lower it, or "
        "raise run.steps"
    )
