"""Distances of the trainer's log-probabilities from the engine's, and from the teacher's, as
metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.metrics import Maximum, Mean, Metrics, merge_reports, read_scalars


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
