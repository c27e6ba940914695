"""The step's loss with its metrics, recomputed; where they depart, the updates once more with one
thing substituted at a time, until one explains the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import finite_metric, format_number, format_percent
from megatron_r1.why.checks.departing_terms import term_departure
from megatron_r1.why.comparison import DEPARTS, EQUAL, ComparedQuantity, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.substitution_candidates import (
    candidate_substitutions,
    clip_substitution,
)

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation, RecomputedUpdates
    from megatron_r1.why.update.step_substitution import Substitution

LOSS = "loss"
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
CLEAR_EXPLANATION_FACTOR = 64
"""An explanation whose distance is the tolerance over this, or less, is clear: other values of its
setting are not tried."""
ESTIMATE_DIGITS = 3
"""Decimal places of an estimate. Those that differ by less, by rounding, are of candidates that do
the same, as the group's deviation and a factor of 2 do where every deviation is 1/2."""
MAX_OTHER_VALUES = 3
"""Other values of one setting that are tried where one explains a departure."""
TOLERANCE_SOURCES = {"float32": "measured (docs/why.md), with a margin", "bfloat16": "a choice"}
COMPARED_METRICS = (
    "loss",
    "kl",
    "entropy",
    "clip_fraction",
    "ratio/max",
    "importance",
    "grad_norm",
)


def compare_loss(step: RecordedStep, recomputation: Recomputation) -> list[ComparedQuantity]:
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
    candidates = list(candidate_substitutions(step, recomputation))
    _show_search(step, recomputation, comparisons, len(candidates))
    if (best_explanation := find_explanation(step, recomputation, candidates)) is None:
        return _with_terms(comparisons, step, recomputation)
    substitution, updates = best_explanation
    text = (
        f"{substitution.name} explains it: loss {_format_value(updates.metrics['loss'])}, recorded "
        f"{_format_value(step.metrics_row.get('loss'))}, by the settings "
        f"{_format_value(base.metrics['loss'])}"
    )
    size = abs(updates.metrics["loss"] - base.metrics["loss"]) / _advantage_scale(step)
    text += f"; {format_percent(size)} of the loss by weight of advantages"
    departing_comparison = next(
        (comparison for comparison in comparisons if comparison.differs), None
    )
    if departing_comparison is None:  # the weights alone
        tolerance = update_limit(step)
        name, subject = "cause of the change of the weights", "updates with one thing substituted"
        size = base.update_distance or math.nan
        source = TOLERANCE_SOURCES[step.run_config.model.dtype]
        cause = ComparedQuantity("optimizer", name, DEPARTS, subject, size, tolerance, source, text)
        return [*comparisons, replace(cause, remedy=substitution.change)]
    explained_comparison = replace(departing_comparison, reason=text, remedy=substitution.change)
    return [
        explained_comparison if comparison is departing_comparison else comparison
        for comparison in comparisons
    ]


def _show_search(
    step: RecordedStep,
    recomputation: Recomputation,
    comparisons: Sequence[ComparedQuantity],
    num_candidates: int,
) -> None:
    """Show what departs before its cause is searched, which may take minutes.

    Args:
        step: what the run recorded of it.
        recomputation: its updates.
        comparisons: those of the loss and its metrics.
        num_candidates: the substitutions that will be tried."""
    if any(comparison.differs for comparison in comparisons):
        recomputation.show_departures(comparisons)
    else:
        recomputation.show_progress("the change of the weights or of Adam's moments departs")
    if place := _likely_place(step, recomputation.base, comparisons):
        recomputation.show_progress(place[0])
    recomputation.show_progress(f"trying what explains it: {num_candidates} substitutions")


def _likely_place(
    step: RecordedStep, base: RecomputedUpdates, comparisons: Sequence[ComparedQuantity]
) -> tuple[str, str] | None:
    """Return that metrics.jsonl is where to look, with the remedy. None unless a single metric
    departs, and the weights and Adam's moments after the step are known and as recomputed.

    Args:
        step: what the run recorded of it.
        base: its updates.
        comparisons: those of the loss and its metrics."""
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
    comparisons: Sequence[ComparedQuantity], step: RecordedStep, recomputation: Recomputation
) -> list[ComparedQuantity]:
    """Return the comparisons with the terms whose gradient departs, in those that depart.

    Args:
        comparisons: those of the loss, which nothing explains.
        step: what the run recorded of it.
        recomputation: its updates."""
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


def _advantage_scale(step: RecordedStep) -> float:
    """Return the mean |advantage| of the responses that are trained on, at least 1e-6."""
    sizes = [abs(a) for group in step.advantages for a in group if not math.isnan(a)]
    return max(1e-6, sum(sizes) / max(1, len(sizes)))


def _metric_tolerance(step: RecordedStep, name: str, metrics: Mapping[str, float]) -> float:
    """Return the largest distance of a metric from its recomputed value, one of `metrics`."""
    dtype, rl = step.run_config.model.dtype, step.config.rl
    if name == "loss":  # of advantages that are all 0, KL and entropy alone
        weights = {"kl": abs(rl.kl_beta), "entropy": abs(rl.entropy_coef)}
        rounding = sum(
            weight * _metric_tolerance(step, term, metrics) for term, weight in weights.items()
        )
        return max(LOSS_ROUNDING[dtype] * _advantage_scale(step), rounding)
    relative = RELATIVE_TOLERANCES[dtype].get(name, DEFAULT_RELATIVE_TOLERANCE[dtype]) * abs(
        metrics[name]
    )
    return max(relative, ABSOLUTE_TOLERANCES[dtype].get(name, 0.0))


def _compare_metric(step: RecordedStep, name: str, updates: RecomputedUpdates) -> ComparedQuantity:
    recomputed_value, logged_value = updates.metrics[name], finite_metric(step.metrics_row, name)
    limit = _metric_tolerance(step, name, updates.metrics)
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
    return ComparedQuantity(
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
        and abs(logged_value - metrics[name]) <= _metric_tolerance(step, name, metrics)
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


def find_explanation(
    step: RecordedStep, recomputation: Recomputation, candidates: Sequence[Substitution]
) -> tuple[Substitution, RecomputedUpdates] | None:
    """Return the first substitution that explains what was recorded, and the updates with it.

    Candidates are tried in the order of an estimate that needs no model, those of equal estimates
    in the order given. Several values of one setting may be within the tolerance; the one nearest
    to the checkpoint after the step is returned. The norm that gradients were clipped to comes
    last, as it takes several recomputations to fit.

    Args:
        step: what the run recorded of it.
        recomputation: its updates.
        candidates: `candidate_substitutions` of the step."""
    estimates = [
        round(recomputation.estimates.distance(substitution, step.metrics_row), ESTIMATE_DIGITS)
        for substitution in candidates
    ]
    order = sorted(range(len(candidates)), key=lambda index: (estimates[index], index))
    matches_record = partial(are_recorded, step)
    for index in order:
        first, updates = candidates[index], recomputation.run(candidates[index], matches_record)
        if updates is None or not explains_record(step, updates):
            continue
        explanations = [(first, updates)]
        if (
            updates.update_distance is not None
            and updates.update_distance > update_limit(step) / CLEAR_EXPLANATION_FACTOR
        ):
            other_candidates = [
                substitution
                for substitution in (candidates[other] for other in order)
                if substitution.setting == first.setting and substitution != first
            ]
            other_values = [
                (substitution, recomputation.run(substitution, matches_record))
                for substitution in other_candidates[:MAX_OTHER_VALUES]
            ]
            explanations += [
                (substitution, other_updates)
                for substitution, other_updates in other_values
                if other_updates is not None and explains_record(step, other_updates)
            ]
        return min(
            explanations,
            key=lambda pair: (pair[1].update_distance or 0.0) + (pair[1].moment_distance or 0.0),
        )
    if (clip := recomputation.fitted_clip) is not None:
        updates = recomputation.run(fitted := clip_substitution(clip), matches_record)
        if updates is not None and explains_record(step, updates):
            return fitted, updates
    return None
