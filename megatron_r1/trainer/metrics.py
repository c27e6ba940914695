"""Metrics that are spread over micro-batches and ranks, and their reduction to one number each.

Among them are the distances of the trainer's log-probabilities from the engine's and the
teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.models import platform

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import PackedMicrobatch
    from megatron_r1.trainer.distributed import GridPosition


@dataclass(frozen=True)
class Mean:
    """A mean that is divided after everything is added up.

    Scalars, as tensors while they are on the device: reading one waits for the GPU, and a pass
    would wait once per micro-batch.

    Attributes:
        total: the sum of the values, ().
        count: how many things were added up, ()."""

    total: Tensor | float
    count: Tensor | float


@dataclass(frozen=True)
class Maximum:
    """A largest value.

    Attributes:
        value: the largest value seen, (); -inf where nothing was."""

    value: Tensor | float


Metrics = Mapping[str, Mean | Maximum]
"""Metrics by their names in `metrics.jsonl`."""


def merge_reports(reports: Iterable[Metrics]) -> dict[str, Mean | Maximum]:
    """Return one report for those of several micro-batches; sums are in fp64.

    The CPU waits for the device once, whatever the number of micro-batches."""
    merged_metrics: dict[str, Mean | Maximum] = {}
    for report in _on_cpu(reports):
        for name, metric in report.items():
            merged_metrics[name] = _merged_metric(merged_metrics.get(name), metric)
    return merged_metrics


def _on_cpu(reports: Iterable[Metrics]) -> list[Metrics]:
    """Return the reports with numbers, read all at once in fp64, in the places of tensors."""
    reports = list(reports)
    metrics = [metric for report in reports for metric in report.values()]
    numbers = iter(read_scalars([x for metric in metrics for x in vars(metric).values()]))
    return [
        {
            name: type(metric)(**{field: next(numbers) for field in vars(metric)})
            for name, metric in report.items()
        }
        for report in reports
    ]


def read_scalars(scalars: Sequence[Tensor | float]) -> list[float]:
    """Return the numbers of scalars, some of which are on the device; it is waited for once.

    Args:
        scalars: tensors () of any dtype, on one device, and numbers."""
    tensors = [x.detach().double().reshape(()) for x in scalars if isinstance(x, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(numbers) if isinstance(x, Tensor) else float(x) for x in scalars]


def nan_max(a: float, b: float) -> float:
    """Return the larger number, NaN if either is; `max` may lose a NaN."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _merged_metric(before: Mean | Maximum | None, metric: Mean | Maximum) -> Mean | Maximum:
    if isinstance(metric, Maximum):
        value = float(metric.value)
        if isinstance(before, Maximum):
            value = nan_max(value, float(before.value))
        return Maximum(value)
    total, count = float(metric.total), float(metric.count)
    if isinstance(before, Mean):
        total, count = float(before.total) + total, float(before.count) + count
    return Mean(total, count)


def reduce_over_data(grid_position: GridPosition, metrics: Metrics) -> dict[str, float]:
    """Return the numbers behind `metrics` of all data- and context-parallel ranks.

    Args:
        grid_position: this rank's place in the grid.
        metrics: the metrics of this rank.

    Returns:
        name → number, on the ranks of the last stage; {} on the other stages. A mean over nothing
        is 0."""
    if not grid_position.is_last_stage:
        return {}
    means = {name: metric for name, metric in metrics.items() if isinstance(metric, Mean)}
    maxima = {name: metric for name, metric in metrics.items() if isinstance(metric, Maximum)}
    device, fp64 = platform.device(), torch.float64
    totals = [float(mean.total) for mean in means.values()]
    counts = [float(mean.count) for mean in means.values()]
    sums = torch.tensor([totals, counts], dtype=fp64, device=device)  # (2, number of means)
    max_values = torch.tensor([float(m.value) for m in maxima.values()], dtype=fp64, device=device)
    # A maximum of several ranks may lose a NaN, so it becomes infinity; infinities stay.
    max_values = max_values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    # Over data and context parallelism: each of these ranks has other samples, or other tokens of
    # the same samples. Ranks of one tensor group have equal numbers and are not added up.
    dist.all_reduce(sums, group=grid_position.groups.dp_cp)
    dist.all_reduce(max_values, dist.ReduceOp.MAX, group=grid_position.groups.dp_cp)
    numbers = dict(zip(maxima, max_values.tolist(), strict=True))
    for name, total, count in zip(means, *sums.tolist(), strict=True):
        numbers[name] = total / count if count else 0.0
    return numbers


def logprob_diff(batches: Sequence[PackedMicrobatch], name: str) -> tuple[Mean, Maximum]:
    """Return mean and maximum of |trainer's - engine's log-probability| over response tokens.

    Args:
        batches: the micro-batches, each with the log-probabilities `name`.
        name: the key of the trainer's log-probabilities in `PackedMicrobatch.logprobs`.
    """
    reports: list[Metrics] = [{"mean": Mean(0.0, 0), "largest": Maximum(0.0)}]
    for batch in batches:
        rows = batch.response_positions
        if rows.numel():
            diffs = (batch.logprobs[name] - batch.rollout_logprobs)[rows].abs()
            total = Mean(diffs.double().sum(), diffs.numel())
            reports.append({"mean": total, "largest": Maximum(diffs.max())})
    merged_metrics = merge_reports(reports)
    mean, max_diff = merged_metrics["mean"], merged_metrics["largest"]
    assert isinstance(mean, Mean) and isinstance(max_diff, Maximum)
    return mean, max_diff


def teacher_kl(batches: Sequence[PackedMicrobatch]) -> Mean:
    """Return the sampled estimate of KL(π_old ‖ teacher).

    It is the mean of log π_old - log π_teacher over the response tokens of `batches`."""
    totals, count = [], 0
    for batch in batches:
        diffs = (batch.logprobs["old"] - batch.logprobs["teacher"])[batch.response_positions]
        totals.append(diffs.double().sum())
        count += diffs.numel()
    return Mean(sum(read_scalars(totals)), count)
