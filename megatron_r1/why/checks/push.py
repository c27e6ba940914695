"""Checks what was pushed: the probes after the push, and the exported model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import format_number
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    ROUNDING_BY_DTYPE,
    Comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

FAMILY = "push"
MERGE_ROUNDING = 2.0**-20
"""Relative: sums of weights and products of adapters in float32, in another order."""


def compare_push(step: RecordedStep, recomputation: Recomputation) -> list[Comparison]:
    """Return the comparisons of the weights that left the trainer: to engines, and to hf/."""
    return [_compare_probe(step), _compare_export(step, recomputation)]


def _compare_probe(step: RecordedStep) -> Comparison:
    name = "probes of the push"
    value = finite_metric(step.metrics_row, "push/probe_diff")
    if "push/probe_diff" not in step.metrics_row:
        return not_checked(FAMILY, name, "metrics.jsonl has no push/probe_diff")
    tolerance = 4 * ROUNDING_BY_DTYPE[step.run_config.rollout.dtype]
    return Comparison(
        FAMILY,
        name,
        EQUAL if value is not None and value <= tolerance else DEPARTS,
        "engines with the trainer, on the probe prompts",
        math.inf if value is None else value,
        tolerance,
        "rounding of rollout.dtype, of a few tokens",
        "push/probe_diff is not a number in metrics.jsonl"
        if value is None
        else f"engines are {format_number(value)} from the trainer after the push",
        remedy="push.transport, push.fp8 (docs/push.md)",
    )


def _compare_export(step: RecordedStep, recomputation: Recomputation) -> Comparison:
    """Compare hf/ with the checkpoint of the last step."""
    name = "exported model"
    if not (step.folder.hf_folder / "config.json").is_file():
        return not_checked(FAMILY, name, "there is no hf/ yet")
    if step.step != step.run_config.run.steps or step.checkpoint_after is None:
        return not_checked(FAMILY, name, "hf/ is of the run's last step")
    distance = recomputation.models.distance(
        (step.folder.hf_folder, ""), (step.checkpoint_after, "")
    )
    has_adapters, is_fp32 = step.run_config.model.lora, step.run_config.model.dtype == "float32"
    if has_adapters and not is_fp32:
        return not_checked(FAMILY, name, "adapters are less than rounding of model.dtype")
    tolerance = MERGE_ROUNDING if has_adapters else 0.0 if is_fp32 else 2.0**-8
    return Comparison(
        FAMILY,
        name,
        EQUAL if distance <= tolerance else DEPARTS,
        f"hf/ with {step.checkpoint_after.name}",
        distance,
        tolerance,
        "rounding of model.dtype",
        "hf/ has other weights than the last checkpoint",
        remedy="hf/: megatron-r1 convert to-hf RUN OUT makes it again",
    )
