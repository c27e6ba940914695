"""Differences of the log-probabilities in micro-batches: of trainer and engine, of policy and
teacher."""

from collections.abc import Sequence

from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.metrics import Maximum, Mean, nan_max


def engine_gap(batches: Sequence[PackedBatch], name: str) -> tuple[Mean, Maximum]:
    """Return the mean and the largest |trainer's - engine's log-probability| over the response
    tokens of `batches`.

    Args:
        batches: the micro-batches, each with the log-probabilities `name`.
        name: key of the trainer's log-probabilities in `PackedBatch.logprobs`."""
    gap, count, largest = 0.0, 0, 0.0
    for batch in batches:
        gaps = (batch.logprobs[name] - batch.rollout_logprobs)[batch.is_response].abs()
        gap, count = gap + gaps.double().sum().item(), count + gaps.numel()
        if gaps.numel():
            largest = nan_max(largest, gaps.max().item())
    return Mean(gap, count), Maximum(largest)


def teacher_kl(batches: Sequence[PackedBatch]) -> Mean:
    """Return the sampled estimate of KL(π_old ‖ teacher): the mean of log π_old - log π_teacher
    over the response tokens of `batches`."""
    total, count = 0.0, 0
    for batch in batches:
        gaps = (batch.logprobs["old"] - batch.logprobs["teacher"])[batch.is_response]
        total, count = total + gaps.double().sum().item(), count + gaps.numel()
    return Mean(total, count)
