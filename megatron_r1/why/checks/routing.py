"""Compares the experts that engines chose, which the trainer replays, with those of the routers of
the trainer and of transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import format_percent
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.checks.sampling import FAMILY
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    CannotRecompute,
    Comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

NAME = "experts of the engines"
OTHER_EXPERTS, OTHER_EXPERTS_IN_16_BITS = 0.001, 0.25
"""The largest share of the engine's experts that the trainer's routers would not choose: in float32
on both sides none were measured, with an engine in bfloat16 a twentieth."""
SHIFTS = {"before": 1, "after": -1}
"""A token that experts may be of, in place of their own, with its shift
(`rows_with_shifted_experts`)."""


def compare_routing(step: RecordedStep, recomputation: Recomputation) -> list[Comparison]:
    """Check that engines choose the experts that the trainer's routers would: replay hides where
    they do not. Nothing is compared where experts are not replayed."""
    if not step.config.rl.routing_replay:
        return []
    agreement = finite_metric(step.metrics_row, "routing/agreement")
    if "routing/agreement" not in step.metrics_row:
        return [not_checked(FAMILY, NAME, "metrics.jsonl has no routing/agreement")]
    if any((sequence.versions != step.step - 1).any() for sequence in step.sequences):
        return [not_checked(FAMILY, NAME, "some tokens were sampled with earlier weights")]
    is_fp32 = {step.run_config.rollout.dtype, step.run_config.model.dtype} == {"float32"}
    tolerance = OTHER_EXPERTS if is_fp32 else OTHER_EXPERTS_IN_16_BITS
    if agreement is None:
        reason = "routing/agreement is not a number in metrics.jsonl"
        remedy = "what makes NaN in the trainer's routers: model.dtype, fp8, its checkpoint"
        return [
            Comparison(
                FAMILY,
                NAME,
                DEPARTS,
                "routing/agreement of metrics.jsonl",
                distance=math.inf,
                tolerance=tolerance,
                reason=reason,
                remedy=remedy,
            )
        ]
    distance = 1 - agreement
    reason, remedy = (
        _find_routing_cause(recomputation, distance, tolerance)
        if distance > tolerance
        else ("", "")
    )
    return [
        Comparison(
            FAMILY,
            NAME,
            EQUAL if distance <= tolerance else DEPARTS,
            f"routing/agreement {agreement:.4g} of metrics.jsonl",
            distance,
            tolerance,
            "scores that differ by rounding (docs/routing_replay.md), with a margin",
            reason,
            remedy=remedy,
        )
    ]


def _find_routing_cause(
    recomputation: Recomputation, distance: float, tolerance: float
) -> tuple[str, str]:
    """Return why the trainer's routers would choose otherwise, and the remedy."""
    reason = (
        f"the trainer's routers would choose {format_percent(distance)} of the experts otherwise"
    )
    try:
        other_fraction = 1 - recomputation.policies.routing_agreement()
        by_side = {
            side: 1 - recomputation.policies.routing_agreement(shift)
            for side, shift in SHIFTS.items()
        }
    except CannotRecompute:
        other_fraction, by_side = distance, {}
    if other_fraction <= tolerance:
        return (
            f"{reason}, those of transformers {format_percent(other_fraction)}: the trainer "
            "replays the experts of other tokens or layers",
            "rl.routing_replay: the tokens and layers that the trainer replays recorded experts at",
        )
    for side, opposite in by_side.items():
        if opposite <= tolerance:
            return (
                f"{reason}: the engine reported experts of another token, those of the token "
                f"{side} are the routers' ({format_percent(1 - opposite)})",
                "the reply of the engine: its experts begin at another token than its tokens",
            )
    return (
        reason,
        "the push of e_score_correction_bias to the engine (docs/push.md); n_group and topk_group "
        "of the engine's config.json",
    )
