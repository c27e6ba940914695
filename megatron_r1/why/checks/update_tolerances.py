"""Says whether recomputed updates are what the run recorded: the tolerances of its metrics, of the
change of its weights, and of Adam's moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.record.recorded_step import RecordedStep

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import RecomputedUpdates

LOSS_ROUNDING = {"float32": 2.0**-19, "bfloat16": 2.0**-7}
"""Largest distance of a loss, over the mean |advantage|: the terms of a loss cancel, so that its
own size says nothing."""
RELATIVE_TOLERANCES = {
    "float32": {"ratio/max": 2.0**-10},
    "bfloat16": {"kl": 0.25, "entropy": 0.05, "grad_norm": 0.15, "importance": 0.05},
}
"""The largest relative distance of the other metrics that are named here."""
DEFAULT_RELATIVE_TOLERANCE = {"float32": 2.0**-12, "bfloat16": 0.5}
"""The largest relative distance of the metrics that are not."""
ABSOLUTE_TOLERANCES = {
    "float32": {"kl": 2.0**-24, "entropy": 2.0**-16, "clip_fraction": 0.002},
    "bfloat16": {"kl": 2e-3, "entropy": 0.01, "clip_fraction": 0.05},
}
"""Largest absolute distance, where that is larger: a small KL is a difference of larger numbers,
and tokens at the edge of a clip fall on either side."""
UPDATE_TOLERANCE = {"float32": 2.0**-8, "bfloat16": 0.5}
"""Largest distance of the change of the weights, relative to it, where gradients are more than
rounding (`parameter_distances`)."""
MOMENT_TOLERANCE, MOMENT_TOLERANCE_16_BITS = {"float32": 2.0**-9, "bfloat16": 0.5}, 2.0**-6
"""Likewise of Adam's moments; the second where `optimizer.moments` has 16 bits."""
TOLERANCE_SOURCES = {"float32": "measured (docs/why.md), with a margin", "bfloat16": "a choice"}


def advantage_scale(step: RecordedStep) -> float:
    """Return the mean |advantage| of the responses that are trained on, at least 1e-6."""
    sizes = [abs(a) for group in step.advantages for a in group if not math.isnan(a)]
    return max(1e-6, sum(sizes) / max(1, len(sizes)))


def metric_tolerance(step: RecordedStep, name: str, metrics: Mapping[str, float]) -> float:
    """Return the largest distance of a metric from its recomputed value.

    Args:
        step: the recorded step.
        name: the metric's name.
        metrics: the recomputed values by name."""
    dtype, rl = step.run_config.model.dtype, step.config.rl
    if name == "loss":  # of advantages that are all 0, KL and entropy alone
        weights = {"kl": abs(rl.kl_beta), "entropy": abs(rl.entropy_coef)}
        rounding = sum(
            weight * metric_tolerance(step, term, metrics) for term, weight in weights.items()
        )
        return max(LOSS_ROUNDING[dtype] * advantage_scale(step), rounding)
    relative = RELATIVE_TOLERANCES[dtype].get(name, DEFAULT_RELATIVE_TOLERANCE[dtype]) * abs(
        metrics[name]
    )
    return max(relative, ABSOLUTE_TOLERANCES[dtype].get(name, 0.0))


def explains_record(step: RecordedStep, updates: RecomputedUpdates) -> bool:
    """Return whether updates have the recorded metrics, and the checkpoint after the step."""
    return are_recorded(step, updates.metrics) and not update_departs(step, updates)


def are_recorded(step: RecordedStep, metrics: Mapping[str, float]) -> bool:
    """Return whether metrics are those of metrics.jsonl.

    Args:
        step: what the run recorded of it.
        metrics: recomputed ones, by name."""
    logged_values = (
        (finite_metric(step.metrics_row, name), name)
        for name in metrics
        if name in step.metrics_row
    )
    return all(
        logged_value is not None
        and abs(logged_value - metrics[name]) <= metric_tolerance(step, name, metrics)
        for logged_value, name in logged_values
    )


def update_limit(step: RecordedStep) -> float:
    """Return the largest distance of the change of the weights."""
    return UPDATE_TOLERANCE[step.run_config.model.dtype]


def update_departs(step: RecordedStep, updates: RecomputedUpdates) -> bool:
    """Return whether the change of the weights, or of Adam's moments, is beyond its tolerance."""
    is_update = updates.update_distance is not None and updates.update_distance > update_limit(step)
    return is_update or moments_depart(step, updates)


def moments_depart(step: RecordedStep, updates: RecomputedUpdates) -> bool:
    """Return whether Adam's moments are beyond their tolerance."""
    return updates.moment_distance is not None and updates.moment_distance > moments_limit(step)


def moments_limit(step: RecordedStep) -> float:
    """Return the largest distance of Adam's moments, relative to them."""
    config = step.run_config
    return max(
        MOMENT_TOLERANCE[config.model.dtype],
        MOMENT_TOLERANCE_16_BITS * (config.optimizer.moments != "float32"),
    )
