"""Yields candidate causes whose numbers are fitted to the run: multiples of learning rate and
gradient, weights of KL and entropy, and tensors without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.candidate_cause import CandidateCause

if TYPE_CHECKING:
    from megatron_r1.why.update.run_differences import RunDifferences

FACTOR_TOLERANCE = 0.01
"""Relative distance of a factor from 1 below which it is 1."""


def fitted_causes(step: RecordedStep, differences: RunDifferences) -> Iterator[CandidateCause]:
    """Yield multiples of learning rate and gradient that a checkpoint shows, and tensors
    without one."""
    if differences.parameters_without_gradient:
        names = ", ".join(differences.parameters_without_gradient[:3])
        yield CandidateCause(
            f"no gradient for {len(differences.parameters_without_gradient):,} tensors, "
            f"as {names},",
            "frozen tensors",
            f"the trainer: {names} get no gradient",
            adam=(("without_gradient", differences.parameters_without_gradient),),
        )
    yield from _term_weight_causes(step, differences)
    if (
        differences.update_factor is not None
        and abs(differences.update_factor - 1) > FACTOR_TOLERANCE
    ):
        rates = tuple(rate * differences.update_factor for rate in step.learning_rates)
        yield CandidateCause(
            f"{differences.update_factor:.3g} times the learning rate",
            "optimizer.learning_rate",
            "optimizer.learning_rate: the optimizer computes with another than the schedule's",
            adam=(("learning_rates", rates),),
        )
    multiples = [differences.gradient_factor]
    norm, recomputed_norm = step.metrics_row.get("grad_norm"), differences.norm
    if isinstance(norm, int | float) and recomputed_norm:
        multiples.append(norm / recomputed_norm)
    for factor in multiples:
        if factor is None or abs(factor - 1) <= FACTOR_TOLERANCE or factor <= 0:
            continue
        yield CandidateCause(
            f"{factor:.4g} times the gradient{_describe_factor(step, factor)}",
            "parallel",
            "the trainer: gradients are summed over micro-batches and ranks, and divided by the "
            "loss's denominator alone",
            adam=(("gradient_factors", (factor,) * step.config.rl.minibatches),),
        )
        yield clip_cause(factor * step.config.optimizer.clip_grad)


def clip_cause(clip: float) -> CandidateCause:
    """Return gradients that are clipped to another norm.

    Args:
        clip: the norm."""
    return CandidateCause(
        f"a gradient clipped to a norm of {clip:.4g}",
        "optimizer.clip_grad",
        adam=(("clip_grad", clip),),
    )


def _term_weight_causes(
    step: RecordedStep, differences: RunDifferences
) -> Iterator[CandidateCause]:
    """Yield the weights of KL and entropy that the logged loss would have."""
    logged, recomputed_loss = step.metrics_row.get("loss"), sum(differences.terms.values())
    if not isinstance(logged, int | float):
        return
    for key, name in (("kl_beta", "kl"), ("entropy_coef", "entropy")):
        value, term = getattr(step.config.rl, key), differences.terms.get(name)
        if not value or not term:
            continue
        # Of the same weights after each update.
        nearest = value * (1 + (logged - recomputed_loss) / term)
        for rounded in dict.fromkeys(float(f"{nearest:.{digits}g}") for digits in (1, 2)):
            if abs(rounded) > 1e-3 * abs(value) and not math.isclose(rounded, value):
                yield CandidateCause(f"rl.{key} {rounded:g}", f"rl.{key}", loss=((key, rounded),))


def _describe_factor(step: RecordedStep, factor: float) -> str:
    """Return what a factor of the gradient is equal to, as text."""
    parallel, count = step.run_config.parallel, step.metrics_row.get("packing/microbatches", 1)
    ranks = parallel.data_parallel_size(parallel.processes)
    for number, noun in ((ranks, "data-parallel ranks"), (count, "micro-batches of an update")):
        for value, words in ((number, "the number"), (1 / number, "1 over the number")):
            if number > 1 and math.isclose(factor, value, rel_tol=FACTOR_TOLERANCE):
                return f", {words} of {noun},"
    return ""
