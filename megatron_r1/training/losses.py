"""What a loss is to the trainer, and how it is found by name.

A loss sees the packed batch and the tokens' log-probabilities and returns a *sum* with its
denominator; the trainer divides by the denominator of the whole optimizer step, over all
micro-batches and data-parallel ranks, so that the result does not depend on how samples were
packed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_r1.training.packed import PackedBatch


class LossTerms(NamedTuple):
    """loss: () fp32 sum; denominator: () int; sums, maxima: metrics to add up or take the maximum
    of.

    A sum named "a/b" is divided by the sum named "b" once everything is added up, and called "a".
    """

    loss: Tensor
    denominator: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


Loss = Callable[[PackedBatch, Tensor, Tensor, dict[str, Any]], LossTerms]
"""(batch, logprobs (T,) with gradient, entropy (T,), settings) → LossTerms."""


def find_loss(name: str) -> Loss:
    """The loss at "package.module:function". Raises ValueError for a name that leads nowhere."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss {name}: {error}; expected package.module:function") from None


def token_weights(batch: PackedBatch, average: str) -> tuple[Tensor, Tensor]:
    """Weights (T,) of the tokens' losses, and the denominator () they add up to.

    "token": every response token weighs 1, out of the number of response tokens. "sequence": those
    of one response add up to 1, out of the number of responses."""
    seen = batch.is_response.float()
    if average == "token":
        return seen, batch.is_response.sum().int()
    if average == "sequence":
        lengths = batch.response_lengths[batch.sample_index].clamp(min=1)
        count = torch.tensor(batch.num_samples, dtype=torch.int, device=seen.device)
        return seen / lengths, count
    raise ValueError(f"loss average {average!r}: use token or sequence")


def supervised(
    batch: PackedBatch, logprobs: Tensor, entropy: Tensor, settings: dict[str, Any]
) -> LossTerms:
    """Cross entropy of the response tokens, averaged over tokens (SFT)."""
    weights, count = token_weights(batch, "token")
    loss = -(torch.where(batch.is_response, logprobs, 0.0) * weights).sum()
    sums = {"loss/tokens": loss.detach(), "tokens": count}
    return LossTerms(loss, count, sums, {})
