"""Token log-probabilities and entropy straight from hidden states: no tokens × vocabulary matrix.

logits = hidden @ weight.T / temperature exist for one chunk of tokens at a time. The forward pass
keeps two numbers per token (log-sum-exp and entropy); the backward pass makes the chunk's logits
again. With z the scaled logits, p = softmax(z), y the target, H the entropy:

    d logprob / d z_j = [j = y] - p_j            d H / d z_j = -p_j (log p_j + H)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.reference.softmax import hide_padding, shard_range, softmax_statistics

CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MiB in fp32, large enough for full GEMM speed


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), differentiable.

    hidden: (T, H); weight: (V_local, H), this rank's equal contiguous share of the vocabulary over
    `group`; targets: (T,) int64 global ids; vocab_size: ids from here on are padding. Returns
    logprobs (T,) and entropy (T,), fp32, equal on every rank of the group. The gradient of `hidden`
    is this rank's part of a sum over the group: whoever made `hidden` reduces it (Megatron's
    copy-to-tensor-parallel-region does). Raises ValueError for shapes that do not fit and a
    temperature that is not positive."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (T, H) and weight (V, H), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _LinearTokenLogprobs.apply(hidden, weight, targets, temperature, group, vocab_size)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, group, vocab_size):
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy, lse = torch.empty_like(logprobs), torch.empty_like(logprobs)
        first = shard_range(len(weight), group)
        for rows in _chunks(len(hidden), len(weight)):
            z = (hidden[rows] @ weight.t()).float() / temperature
            hide_padding(z, first, vocab_size)
            logprobs[rows], entropy[rows], lse[rows] = softmax_statistics(
                z, targets[rows], first, group
            )
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.settings = temperature, group, vocab_size
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        temperature, group, vocab_size = ctx.settings
        first = shard_range(len(weight), group)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(len(hidden), len(weight)):
            z = (hidden[rows] @ weight.t()).float() / temperature
            hide_padding(z, first, vocab_size)
            log_p = z - lse[rows, None]
            p = log_p.exp()
            d_z = -p * grad_logprobs[rows, None]
            if grad_entropy is not None and grad_entropy.any():
                spread = torch.nan_to_num(log_p, neginf=0.0) + entropy[rows, None]
                d_z -= grad_entropy[rows, None] * p * spread
            local = targets[rows] - first
            here = ((local >= 0) & (local < len(weight))).nonzero()[:, 0]
            d_z[here, local[here]] += grad_logprobs[rows][here]
            d_z = (d_z / temperature).to(hidden.dtype)
            grad_hidden[rows] = d_z @ weight
            grad_weight += d_z.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: int, columns: int):
    size = max(1, CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
