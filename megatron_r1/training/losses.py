"""What a loss is to the trainer, and how it is found by name.

A loss sees the packed batch and the head behind its hidden states and returns a *sum* with its
denominator; the trainer divides by the denominator of the whole optimizer step, over all
micro-batches and data-parallel ranks, so that the result does not depend on how samples were
packed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_r1.training.head import Head
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


Loss = Callable[[PackedBatch, Head, dict[str, Any]], LossTerms]
"""(batch, its head, settings) → LossTerms."""


def find_loss(name: str) -> Loss:
    """The loss at "package.module:function". Raises ValueError for a name that leads nowhere."""
    return find_function(name, "loss")


def find_function(name: str, what: str) -> Callable:
    """What is at "package.module:function". Raises ValueError, which calls it a `what`, for a name
    that leads nowhere."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {name}: {error}; expected package.module:function") from None


def denominator(batch: PackedBatch, average: str) -> Tensor:
    """What a sum of the batch's losses is divided by, (): "token": the number of response tokens;
    "sequence": the number of responses, of each of which the sum holds the mean; "constant": the
    same, of each of which it holds the sum over a constant."""
    if average == "token":
        return batch.is_response.sum().int()
    if average in ("sequence", "constant"):
        return torch.tensor(batch.num_samples, dtype=torch.int, device=batch.is_response.device)
    raise ValueError(f"loss average {average!r}: use token, sequence or constant")


def supervised(batch: PackedBatch, head: Head, settings: dict[str, Any]) -> LossTerms:
    """Cross entropy of the response tokens, averaged over tokens (SFT)."""
    logprobs, _ = head.logprobs()
    loss, count = -logprobs.sum(), denominator(batch, "token")
    return LossTerms(loss, count, {"loss/tokens": loss.detach(), "tokens": count}, {})
