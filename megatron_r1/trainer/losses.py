"""The interface of losses, the two places of averaging, and the supervised loss.

Policy losses are in `controller.algorithms`, those of reward models in `reward_losses`, that of
PPO's critic in `value_loss`.

A loss takes the packed micro-batch and the head behind its hidden states and returns a *sum* with
its denominator. The trainer divides by the denominator of the whole optimizer step, over all
micro-batches and data-parallel ranks, so that the result does not depend on how samples were
packed. It is named by an algorithm, or by the command that trains, as "module:function".

Averaging happens in two places. Within a micro-batch r1_kernels weighs the tokens of the sum as
`make_token_averaging` says; over the optimizer step the trainer divides by the sum of
`loss_denominator`.
`rl.loss_average` selects both in `controller.algorithms.grpo.loss`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1.config.loss_settings import LossAverage, LossSettings
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.loss_head import LossHead, TokenAveraging
from megatron_r1.trainer.metrics import Mean, Metrics


class LossSum(NamedTuple):
    """A loss as a sum, with its denominator and metrics.

    Attributes:
        loss: () fp32.
        denominator: () int.
        metrics: the metrics of this micro-batch, on this rank."""

    loss: Tensor
    denominator: Tensor
    metrics: Metrics


Loss = Callable[[PackedMicrobatch, LossHead, LossSettings | None], LossSum]
"""(batch, its head, settings) → LossSum. settings: of a policy loss; None for the others."""


def loss_denominator(batch: PackedMicrobatch, average: LossAverage) -> Tensor:
    """Return the denominator, () int32, of a sum of the batch's losses.

    All branches of an episode are one response.

    Args:
        batch: a micro-batch.
        average: "token" gives the number of response tokens; "sequence" (the sum holds each
            response's mean) and "constant" (it holds each response's sum over a constant) the
            number of responses.

    Raises:
        ValueError: `average` is not one of these three."""
    if average == "token":
        return batch.is_response.sum().int()
    if average in ("sequence", "constant"):
        # By a kernel: `torch.tensor` would copy, and the CPU wait for the copy.
        return torch.full((), batch.num_responses, dtype=torch.int, device=batch.advantages.device)
    raise ValueError(f"loss average {average!r}: use token, sequence or constant")


def make_token_averaging(
    batch: PackedMicrobatch, average: LossAverage, max_response_tokens: int | None = None
) -> TokenAveraging:
    """Return the weights of tokens in `LossHead.policy_loss`.

    A response token has the weight 1 ("token"), 1 / |o_i| ("sequence"), or 1 / L
    ("constant"). |o_i| counts an episode with all its branches: r1_kernels takes each branch for
    a sequence of its own, so there batch.sequence_weights are the weights.

    Args:
        batch: a micro-batch.
        average: "token", "sequence" or "constant".
        max_response_tokens: L, tokens."""
    if average == "sequence":
        if batch.sequence_weights is None:
            return TokenAveraging(batch.is_response, average="sequence")
        return TokenAveraging(batch.sequence_weights)
    if average == "constant":
        assert max_response_tokens, "a constant average is over max_response_tokens"
        return TokenAveraging(batch.is_response, denominator=max_response_tokens)
    return TokenAveraging(batch.is_response)


def supervised_loss(batch: PackedMicrobatch, head: LossHead, settings: object = None) -> LossSum:
    """Return the SFT loss, -Σ log p over response tokens, () fp32, with their number.

    Args:
        batch: the micro-batch.
        head: the head behind its hidden states.
        settings: None; it is here because every `Loss` is called with three arguments."""
    logprobs, _ = head.logprobs()
    loss, count = -logprobs.sum(), loss_denominator(batch, "token")
    return LossSum(loss, count, {"loss": Mean(loss.detach(), count)})
