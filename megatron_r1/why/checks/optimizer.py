"""Compares the change of the weights and of Adam's moments with that of the recomputed updates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import format_percent
from megatron_r1.why.checks.departing_terms import compare_terms
from megatron_r1.why.checks.update_tolerances import (
    TOLERANCE_SOURCES,
    moments_depart,
    moments_limit,
    update_limit,
)
from megatron_r1.why.comparison import DEPARTS, EQUAL, Comparison, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation, RecomputedUpdates

FAMILY = "optimizer"
MAX_TENSOR_DISTANCE = 0.5
"""The largest relative distance of the change of one tensor: all its gradients may be small."""


def compare_update(step: RecordedStep, recomputation: Recomputation) -> list[Comparison]:
    """Return the comparisons of the gradient of each term, of the change of the weights, and of
    Adam's moments, with those that were recomputed.

    Args:
        step: what the run recorded of it.
        recomputation: its updates."""
    base = recomputation.base
    comparisons = [_compare_change(step, base), _compare_recomputed_moments(step, base)]
    terms = compare_terms(step, recomputation)
    return [
        terms,
        *(
            replace(comparison, remedy=f"{comparison.remedy}{recomputation.inputs.left_out_note}")
            for comparison in comparisons
        ),
    ]


def _compare_change(step: RecordedStep, base: RecomputedUpdates) -> Comparison:
    name = "change of the weights"
    if base.update_distance is None:
        return not_checked(FAMILY, name, f"there is no checkpoint of step {step.step}")
    tolerance = update_limit(step)
    largest_distances = ", ".join(
        f"{key} {format_percent(value)}" for key, value in base.by_parameter[:3]
    )
    departing_parameters = [
        key for key, value in base.by_parameter if value > max(tolerance, MAX_TENSOR_DISTANCE)
    ]
    return Comparison(
        FAMILY,
        name,
        EQUAL if base.update_distance <= tolerance and not departing_parameters else DEPARTS,
        f"|run's - recomputed| over |run's|, all parameters; the largest: {largest_distances}",
        base.update_distance,
        tolerance,
        TOLERANCE_SOURCES[step.run_config.model.dtype],
        "the step changed other weights than its gradient: "
        f"{', '.join(departing_parameters[:3]) or largest_distances}",
        remedy="the optimizer's settings and state; the tensors named (megatron-r1 compare "
        "with a run without the fault)",
    )


def _compare_recomputed_moments(step: RecordedStep, base: RecomputedUpdates) -> Comparison:
    name = "change of Adam's moments"
    if base.moment_distance is None:
        return not_checked(FAMILY, name, f"no checkpoint of step {step.step} has them")
    return Comparison(
        FAMILY,
        name,
        DEPARTS if moments_depart(step, base) else EQUAL,
        "|run's - recomputed| over |run's|, all parameters, of the first or the second moments",
        base.moment_distance,
        moments_limit(step),
        TOLERANCE_SOURCES[step.run_config.model.dtype],
        "Adam's moments are of other gradients than the step's loss has",
        remedy="the sum of gradients over micro-batches and ranks, optimizer.clip_grad, beta1, "
        "beta2",
    )
