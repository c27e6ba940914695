"""Token log-probabilities and entropy from logits that already exist, vocabulary-parallel.

The forward pass reads the logits once; the backward pass reads them once more and writes their
gradient, on request into the same memory. With z the logits, c = 1 / temperature, p = softmax(c z),
y the target and H the entropy:

    d logprob / d z_j = c ([j = y] - p_j)            d H / d z_j = -c p_j (log p_j + H)

With a sampling mask all of this is over the kept ids j, and the other logits get 0."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import (
    check_count,
    check_floats,
    check_same_device,
    check_targets,
    check_temperature,
)
from r1_kernels.linear_head import shard_gradient, shard_statistics
from r1_kernels.registry import choose_primitives
from r1_kernels.sampling_mask import SamplingMask, check_sampling_mask
from r1_kernels.vocabulary import PendingStatistics, RowUpstream, VocabShard


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    sampling_mask: SamplingMask | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target) and entropy (nats) of softmax(logits / temperature), differentiable.

    Args:
        logits: (T, V_local) float, this rank's equal contiguous share of the vocabulary over
            `group`.
        targets: (T,) int64 or int32 global ids.
        temperature: the logits are divided by it; positive.
        group: the ranks that share the vocabulary; None: this rank has all of it.
        vocab_size: ids from here on are padding; None: there is none.
        sampling_mask: the ids that the sampler kept at each of the T tokens; the softmax is over
            these. None: over the whole vocabulary.
        inplace_backward: whether the backward pass writes the gradient over `logits`, which no
            other operation may need; it can then run once.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        logprobs and entropy, (T,) each, fp32 (fp64 for fp64), the same bits on every rank of the
        group.

    Raises:
        ValueError: shapes, dtypes, devices, targets, a sampling mask and a temperature that do not
            fit."""
    check_same_device(logits=logits, targets=targets)
    check_floats(logits=logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (T, V), got {tuple(logits.shape)}: flatten the batch")
    check_temperature(temperature)
    check_count(vocab_size=vocab_size)
    shard = VocabShard.from_columns(logits, logits.shape[1], group, vocab_size)
    check_targets(targets, len(logits), shard.vocab_size)
    kept_ids = check_sampling_mask(sampling_mask, targets, shard.vocab_size)
    owner = logits if logits._base is None else logits._base
    if inplace_backward and owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace_backward would write over a leaf tensor, or a view of one: a parameter's own "
            "values"
        )
    return _TokenLogprobs.apply(
        logits,
        targets,
        shard,
        1.0 / temperature,
        kept_ids,
        inplace_backward,
        choose_primitives(logits, backend),
    )


class _TokenLogprobs(torch.autograd.Function):
    """Computes `token_logprobs` of checked arguments.

    Saved: the logits, by reference, and three fp32 numbers per token: entropy, largest logit and
    log of the sum."""

    @staticmethod
    def forward(ctx, logits, targets, shard, scale, kept_ids, inplace, primitives):
        ctx.set_materialize_grads(False)
        local_statistics = shard_statistics(
            primitives, _logits_rows(logits), targets, shard, scale, kept_ids
        )
        softmax = PendingStatistics(local_statistics, scale, shard.group).wait()
        # The version counter would refuse a backward pass that writes over its own input.
        ctx.logits = logits if inplace else None
        ctx.save_for_backward(None if inplace else logits, targets, *softmax[1:])
        ctx.settings = shard, scale, kept_ids, inplace, primitives
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, targets, entropy, peak, log_total = ctx.saved_tensors
        shard, scale, kept_ids, is_inplace, primitives = ctx.settings
        if is_inplace:
            logits, ctx.logits = ctx.logits, None
            if logits is None:
                raise RuntimeError("inplace_backward: a backward pass has overwritten the logits")
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        rows = _logits_rows(logits)
        out = rows if is_inplace else torch.empty_like(rows)
        upstream = RowUpstream(entropy, peak, log_total, grad_logprobs, grad_entropy)
        shard_gradient(primitives, rows, targets, shard, scale, upstream, kept_ids, out)
        return out, *(None,) * 6


def _logits_rows(logits: Tensor) -> Tensor:
    """Return `logits` if its columns are adjacent and its rows do not overlap, else a copy."""
    has_separate_rows = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return logits if has_separate_rows else logits.contiguous()
