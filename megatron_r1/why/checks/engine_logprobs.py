"""Compares the engines' log-probabilities with those of transformers under the weights of the
version that each token was sampled with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.reporting.formatting import format_number
from megatron_r1.why.checks.engine_causes import (
    DepartureCause,
    missing_router_bias,
    other_adapter_scale,
    other_temperature,
    renormalized_cut,
    rounding_of_bfloat16,
    shifted_by_a_token,
    stale_weights,
)
from megatron_r1.why.checks.engine_gaps import EngineGaps, mean_gap
from megatron_r1.why.checks.expert_causes import departing_expert
from megatron_r1.why.checks.fp8_causes import other_fp8_weights
from megatron_r1.why.checks.sampling import FAMILY
from megatron_r1.why.checks.tensor_causes import departing_tensor
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    Comparison,
    ResponseIndex,
    not_checked,
    with_untried,
)
from megatron_r1.why.formulas import kl_of_difference
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.rerun_verdicts import ENGINE_REMEDY, rerun_hint
from megatron_r1.why.step_report import DepartureCurve

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

NAME = "engines' log-probabilities"
TOLERANCE_SOURCE = "rounding of the engine's dtype (docs/compare.md), mean over tokens"
FP8_TOLERANCE_SOURCE = (
    "rounding of the engine's bfloat16, on a GPU also of 8-bit activations; on a CPU at most "
    "0.0034 was measured in five steps of three dense runs, and 0.0048 in a step with experts"
)
SEARCHED_CAUSES: tuple[Callable[[EngineGaps], DepartureCause | None], ...] = (
    other_fp8_weights,
    other_adapter_scale,
    stale_weights,
    missing_router_bias,
    other_temperature,
    shifted_by_a_token,
    renormalized_cut,
    departing_expert,
    departing_tensor,
    rounding_of_bfloat16,
)
"""In the order in which they are tried."""
SENSITIVE_CAUSES = (other_fp8_weights,)
"""Those that find differences as small as rounding."""


def compare_logprobs(step: RecordedStep, recomputation: Recomputation) -> list[Comparison]:
    """Return the comparison of the engines' log-probabilities."""
    gaps = EngineGaps(step, recomputation.engine_policy)
    differences = np.concatenate(gaps.gaps) if gaps.gaps else np.empty(0)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return [not_checked(FAMILY, NAME, "no checkpoint of the tokens' versions is kept")]
    subject = (
        f"those of {len(differences):,} tokens of {len(gaps.gaps):,} sequences with "
        f"transformers' under the weights of their version{_describe_encoding(step)}; mean |Δ| by "
        "engine: "
        + ", ".join(
            f"{engine} {format_number(mean)}" for engine, mean in gaps.engine_means().items()
        )
        + f"; KL {format_number(kl_of_difference(-differences))}"
    )
    cause = _find_engine_cause(gaps)
    if cause is None and gaps.distance <= gaps.tolerance and not gaps.departing_engine():
        return [
            Comparison(
                FAMILY, NAME, EQUAL, subject, gaps.distance, gaps.tolerance, _tolerance_source(step)
            )
        ]
    return [_departing_comparison(gaps, subject, cause)]


def _describe_encoding(step: RecordedStep) -> str:
    """Return how the push encodes weights, as text."""
    if not step.run_config.push.fp8:
        return ""
    return ", quantized as the push quantizes them, with activations in float32"


def _tolerance_source(step: RecordedStep) -> str:
    """Return where the tolerance comes from."""
    return FP8_TOLERANCE_SOURCE if step.run_config.push.fp8 else TOLERANCE_SOURCE


def _departing_comparison(
    gaps: EngineGaps, subject: str, cause: DepartureCause | None
) -> Comparison:
    """Return the comparison that departs, with its cause where that is known."""
    cause = cause or DepartureCause(
        f"mean |Δ| is {format_number(gaps.distance)}: the engine computes another function of "
        "these weights than transformers",
        ENGINE_REMEDY + rerun_hint(gaps.step, "engine"),
    )
    departures: dict[ResponseIndex, float] = {}  # of an episode its largest sequence's
    for sequence, gap in zip(gaps.sequences, gaps.gaps, strict=True):
        if (size := mean_gap([gap])) > gaps.tolerance:
            departures[sequence.response] = max(size, departures.get(sequence.response, 0.0))
    # NaN is not above the tolerance.
    num_tokens = int(sum((np.abs(gap) > gaps.tolerance).sum() for gap in gaps.gaps))
    return Comparison(
        FAMILY,
        NAME,
        DEPARTS,
        subject,
        gaps.distance,
        gaps.tolerance,
        _tolerance_source(gaps.step),
        with_untried(cause.reason, gaps.untried_causes),
        list(departures),
        num_tokens,
        gaps.step.loss_fraction(list(departures)),
        cause.remedy,
        list(departures.values()),
    )


def _find_engine_cause(gaps: EngineGaps) -> DepartureCause | None:
    """Return what explains the distance; None where nothing does."""
    is_small = gaps.distance <= gaps.tolerance / 16 and not gaps.departing_engine()
    from megatron_r1.why.policy.step_models import NotInMemory

    for find_cause in SENSITIVE_CAUSES if is_small else SEARCHED_CAUSES:
        try:
            cause = find_cause(gaps)
        except NotInMemory:
            gaps.untried_causes.append(find_cause.__name__.replace("_", " "))
            continue
        if cause is not None:
            return cause
    return None


def departure_curves(recomputation: Recomputation) -> list[DepartureCurve]:
    """Return how far engines are from transformers over the position in the response; nothing where
    that could not be recomputed."""
    if "old_logprobs" not in vars(recomputation.engine_policy):
        return []
    gaps = EngineGaps(recomputation.step, recomputation.engine_policy)
    return [DepartureCurve("engine against the checkpoint", *gaps.position_means())]
