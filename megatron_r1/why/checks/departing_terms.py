"""Finds loss terms whose gradient the run added more or less often than its settings say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import format_percent
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    CannotRecompute,
    Comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.loss_terms import num_left_out

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation
    from megatron_r1.why.update.term_coefficients import Coefficient, TermFit

FAMILY, NAME = "optimizer", "gradient of each term"
COEFFICIENT_TOLERANCE = {"float32": 2.0**-8, "bfloat16": 2.0**-3}
"""Largest distance of a coefficient from what it should be."""
TOLERANCE_SOURCES = {
    "float32": "measured, with a margin; rounding over the term's size",
    "bfloat16": "a choice",
}
GRADIENT_REMEDY = (
    "the sum of gradients over micro-batches and ranks, the loss's denominator, optimizer.clip_grad"
)
"""Where all terms have one coefficient, which is then not of the terms."""


def compare_terms(step: RecordedStep, recomputation: Recomputation) -> Comparison:
    """Return the comparison of the terms' gradients with the run's.

    Args:
        step: what the run recorded of it.
        recomputation: its updates."""
    try:
        fit = recomputation.term_fit
    except CannotRecompute as error:
        return not_checked(FAMILY, NAME, str(error))
    dtype = step.run_config.model.dtype
    parts = [*map(_describe_term, fit.coefficients), *_unchecked_gradients(step, recomputation)]
    if fit.residual > fit.error:
        parts.append(
            f"{format_percent(fit.residual)} of the run's gradient is no combination of these"
        )
    text = "; ".join(parts)
    known_coefficients = [
        coefficient for coefficient in fit.coefficients if coefficient.is_identifiable
    ]
    if not known_coefficients:
        return not_checked(FAMILY, NAME, text)
    departing_coefficients = fit.departing_coefficients(COEFFICIENT_TOLERANCE[dtype])
    reason, remedy = term_departure(step, recomputation)
    worst = max(
        departing_coefficients or known_coefficients,
        key=lambda coefficient: (
            _coefficient_distance(coefficient) / _coefficient_tolerance(coefficient, dtype)
        ),
    )
    return Comparison(
        FAMILY,
        NAME,
        DEPARTS if departing_coefficients else EQUAL,
        f"norm of each term's gradient and its coefficient in Adam's first moments: {text}",
        _coefficient_distance(worst),
        _coefficient_tolerance(worst, dtype),
        TOLERANCE_SOURCES[dtype],
        f"{reason} ({text})" if departing_coefficients else "",
        remedy=remedy,
    )


def term_departure(step: RecordedStep, recomputation: Recomputation) -> tuple[str, str]:
    """Return which terms depart and what to change, "" where none is known to.

    Args:
        step: what the run recorded of it.
        recomputation: its updates."""
    try:
        fit = recomputation.term_fit
    except CannotRecompute:  # `compare_terms` reports it
        return "", ""
    departing_coefficients = fit.departing_coefficients(
        COEFFICIENT_TOLERANCE[step.run_config.model.dtype]
    )
    if not departing_coefficients:
        return "", ""
    return _describe_terms(departing_coefficients), _suggest_remedy(fit, departing_coefficients)


def _coefficient_distance(coefficient: Coefficient) -> float:
    return abs(coefficient.value - coefficient.term.expected_coefficient)


def _coefficient_tolerance(coefficient: Coefficient, dtype: str) -> float:
    return max(COEFFICIENT_TOLERANCE[dtype], coefficient.uncertainty)


def _describe_term(coefficient: Coefficient) -> str:
    """Return a term with its norm and coefficient, as text."""
    text = f"{coefficient.term.name} {coefficient.norm:.3g}"
    if coefficient.is_identifiable:
        return f"{text} x {_rounded_text(coefficient.value, 4)} ± {coefficient.uncertainty:.1g}"
    if not coefficient.norm:
        return f"{text}, not identifiable: it has no gradient"
    return (
        f"{text}, not identifiable: its coefficient is uncertain by "
        f"{coefficient.uncertainty:.1g}, as its gradient is small or that of other terms"
    )


def _rounded_text(value: float, digits: int) -> str:
    """Return a number as text, 0 without a sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _unchecked_gradients(step: RecordedStep, recomputation: Recomputation) -> list[str]:
    """Return what has a gradient that is not computed, as text."""
    texts = []
    if recomputation.inputs.trains_mtp_layers:
        texts.append("the MTP layers' loss, not checked: it is not recomputed")
    if num_left_out(step) and not step.has_response_advantages:
        texts.append(
            "responses left out of the loss, not checked: the advantages that they would have are "
            f"not known for rl.algorithm: {step.config.rl.algorithm}, rl.reward_normalization: "
            f"{step.config.rl.reward_normalization}"
        )
    return texts


def _describe_terms(departing_coefficients: Sequence[Coefficient]) -> str:
    parts = []
    for coefficient in departing_coefficients:
        value = _rounded_text(coefficient.value, 2)
        is_out = (
            ", though it is left out of the loss"
            if not coefficient.term.expected_coefficient
            else ""
        )
        parts.append(f"{coefficient.term.name} entered with {value} times its gradient{is_out}")
    return ", ".join(parts)


def _suggest_remedy(fit: TermFit, departing_coefficients: Sequence[Coefficient]) -> str:
    """Return what to change: where all terms have one factor, what they have in common."""
    known_coefficients = [
        coefficient
        for coefficient in fit.coefficients
        if coefficient.is_identifiable and coefficient.term.expected_coefficient
    ]
    remedies = [coefficient.term.remedy for coefficient in departing_coefficients]
    if departing_coefficients == known_coefficients:
        values = [coefficient.value for coefficient in known_coefficients]
        if max(values) - min(values) <= max(
            coefficient.uncertainty for coefficient in known_coefficients
        ):
            is_of_policy = {coefficient.term.part for coefficient in known_coefficients} == {
                "policy"
            }
            remedies = [GRADIENT_REMEDY, *(remedies if is_of_policy else ())]
    return "; ".join(dict.fromkeys(remedies))
