"""Token log-probabilities and entropy from logits that already exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.reference.softmax import hide_padding, shard_range, softmax_statistics


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(logits / temperature), without gradient.

    logits: (T, V_local) any float dtype, this rank's equal contiguous share of the vocabulary over
    `group`; targets: (T,) int64 global ids; vocab_size: ids from here on are padding.
    Returns logprobs (T,) and entropy (T,), fp32, equal on every rank of the group.
    """
    with torch.no_grad():
        scaled = logits.float() / temperature
        first = shard_range(logits.shape[-1], group)
        hide_padding(scaled, first, vocab_size)
        logprobs, entropy, _ = softmax_statistics(scaled, targets, first, group)
        return logprobs, entropy
