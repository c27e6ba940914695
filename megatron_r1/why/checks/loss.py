"""Compares the step's loss and its metrics with recomputed ones, and has the cause searched where
they depart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import format_number, format_percent
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.checks.cause_search import candidate_causes, find_update_cause
from megatron_r1.why.checks.departing_terms import term_departure
from megatron_r1.why.checks.update_tolerances import (
    TOLERANCE_SOURCES,
    advantage_scale,
    metric_tolerance,
    update_departs,
    update_limit,
)
from megatron_r1.why.comparison import DEPARTS, EQUAL, Comparison, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation, RecomputedUpdates

LOSS = "loss"
COMPARED_METRICS = (
    "loss",
    "kl",
    "entropy",
    "clip_fraction",
    "ratio/max",
    "importance",
    "grad_norm",
)


def compare_loss(step: RecordedStep, recomputation: Recomputation) -> list[Comparison]:
    """Return the comparisons of the loss and its metrics.

    Args:
        step: what the run recorded of it.
        recomputation: its updates."""
    base = recomputation.base
    comparisons = [
        _compare_metric(step, name, base)
        for name in COMPARED_METRICS
        if name in base.metrics and name in step.metrics_row
    ]
    terms = ", ".join(f"{name} {format_number(value)}" for name, value in base.terms.items())
    if not comparisons:
        return [not_checked(LOSS, "loss", "metrics.jsonl has none of its metrics")]
    comparisons[0] = replace(
        comparisons[0], description=f"{comparisons[0].description}; |terms|: {terms}"
    )
    departs = any(comparison.differs for comparison in comparisons)
    if not departs and not update_departs(step, base):
        return comparisons
    if not recomputation.searches_causes or any(
        math.isinf(comparison.distance) for comparison in comparisons
    ):
        return comparisons
    candidates = list(candidate_causes(step, recomputation))
    _show_search(step, recomputation, comparisons, len(candidates))
    if (cause_with_updates := find_update_cause(step, recomputation, candidates)) is None:
        return _with_terms(comparisons, step, recomputation)
    candidate, updates = cause_with_updates
    text = (
        f"{candidate.name} explains it: loss {_format_value(updates.metrics['loss'])}, recorded "
        f"{_format_value(step.metrics_row.get('loss'))}, by the settings "
        f"{_format_value(base.metrics['loss'])}"
    )
    size = abs(updates.metrics["loss"] - base.metrics["loss"]) / advantage_scale(step)
    text += f"; {format_percent(size)} of the loss by weight of advantages"
    departing_comparison = next(
        (comparison for comparison in comparisons if comparison.differs), None
    )
    if departing_comparison is None:  # the weights alone
        tolerance = update_limit(step)
        name, subject = "cause of the change of the weights", "updates with one thing substituted"
        size = base.update_distance or math.nan
        source = TOLERANCE_SOURCES[step.run_config.model.dtype]
        cause = Comparison("optimizer", name, DEPARTS, subject, size, tolerance, source, text)
        return [*comparisons, replace(cause, remedy=candidate.remedy_or_setting)]
    explained_comparison = replace(
        departing_comparison, reason=text, remedy=candidate.remedy_or_setting
    )
    return [
        explained_comparison if comparison is departing_comparison else comparison
        for comparison in comparisons
    ]


def _show_search(
    step: RecordedStep,
    recomputation: Recomputation,
    comparisons: Sequence[Comparison],
    num_candidates: int,
) -> None:
    """Show what departs before its cause is searched, which may take minutes."""
    if any(comparison.differs for comparison in comparisons):
        recomputation.show_departures(comparisons)
    else:
        recomputation.show_progress("the change of the weights or of Adam's moments departs")
    if place := _likely_place(step, recomputation.base, comparisons):
        recomputation.show_progress(place[0])
    recomputation.show_progress(f"trying what explains it: {num_candidates} substitutions")


def _likely_place(
    step: RecordedStep, base: RecomputedUpdates, comparisons: Sequence[Comparison]
) -> tuple[str, str] | None:
    """Return that metrics.jsonl is where to look, with the remedy. None unless a single metric
    departs, and the weights and Adam's moments after the step are known and as recomputed."""
    is_known = base.update_distance is not None and base.moment_distance is not None
    names = [comparison.name for comparison in comparisons if comparison.differs]
    if len(names) != 1 or not is_known or update_departs(step, base):
        return None
    row = f"the row of step {step.step} in metrics.jsonl"
    return (
        f"the weights, Adam's moments and all metrics but {names[0]} are as recomputed: {row} is "
        "the likely place",
        f"{row}, or what writes it",
    )


def _with_terms(
    comparisons: Sequence[Comparison], step: RecordedStep, recomputation: Recomputation
) -> list[Comparison]:
    """Return the comparisons with the terms whose gradient departs, in those that depart."""
    if not any(comparison.differs for comparison in comparisons):
        return list(comparisons)
    reason, remedy = term_departure(step, recomputation)
    if not reason and (place := _likely_place(step, recomputation.base, comparisons)):
        reason, remedy = place
    return [
        replace(
            comparison,
            reason=f"{comparison.reason}; {reason}" if reason else comparison.reason,
            remedy=f"{remedy or comparison.remedy}{recomputation.inputs.left_out_note}",
        )
        if comparison.differs
        else comparison
        for comparison in comparisons
    ]


def _compare_metric(step: RecordedStep, name: str, updates: RecomputedUpdates) -> Comparison:
    recomputed_value, logged_value = updates.metrics[name], finite_metric(step.metrics_row, name)
    limit = metric_tolerance(step, name, updates.metrics)
    distance = math.inf if logged_value is None else abs(logged_value - recomputed_value)
    reason = (
        f"{name} is {_format_value(logged_value)} in metrics.jsonl, "
        f"{_format_value(recomputed_value)} recomputed"
    )
    remedy = "the loss: rl.algorithm and its settings, or the trainer"
    if logged_value is None:
        reason = (
            f"{name} is not a number in metrics.jsonl, {_format_value(recomputed_value)} recomputed"
        )
        remedy = "what makes NaN in the trainer: the loss, model.dtype, model.fusions, fp8"
    return Comparison(
        LOSS,
        name,
        EQUAL if distance <= limit else DEPARTS,
        f"{_format_value(logged_value)} of metrics.jsonl with {_format_value(recomputed_value)} "
        f"recomputed, over {step.config.rl.minibatches} updates",
        distance,
        limit,
        TOLERANCE_SOURCES[step.run_config.model.dtype],
        reason,
        remedy=remedy,
    )


def _format_value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "no number"
