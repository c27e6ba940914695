"""Token log-probabilities and entropy from hidden states, without logits of all tokens.

Without a gradient: one matrix product, whose result exists for one chunk at a time. With a
gradient, the backward pass computes each chunk's logits again (four products in all), because the
upstream gradient is not known before; where it is known, `linear_policy_loss` needs three."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import (
    check_count,
    check_head,
    check_same_device,
    check_targets,
    check_temperature,
)
from r1_kernels.autocast import without_autocast
from r1_kernels.gemm import wide
from r1_kernels.linear_head import HeadGradients, LinearHead, default_chunk_tokens, head_softmax
from r1_kernels.registry import choose
from r1_kernels.vocabulary import RowUpstream, VocabShard


@without_autocast
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target) and entropy (nats) of softmax(hidden @ weight.T / temperature).

    Differentiable in hidden and weight. Autocast is off inside: products are in the dtype of
    hidden.

    Args:
        hidden: (T, H) float.
        weight: (V_local, H) of the same dtype, this rank's equal contiguous share of the vocabulary
            over `group`.
        targets: (T,) int64 or int32 global ids, valid for every token.
        temperature: the logits are divided by it; positive.
        group: the ranks that share the vocabulary; None: this rank has all of it.
        vocab_size: ids from here on are padding; None: there is none.
        chunk_tokens: tokens whose logits exist at once; None: chosen by device and vocabulary.
        reduce_hidden_grad: whether the gradient of `hidden` is summed over the group; False leaves
            this rank's part, for callers that sum it themselves, as Megatron's tensor-parallel
            regions do.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        logprobs and entropy, (T,) each, fp32 (fp64 for fp64), the same bits on every rank.

    Raises:
        ValueError: shapes, dtypes, devices, targets and a temperature that do not fit."""
    check_same_device(hidden=hidden, weight=weight, targets=targets)
    head = make_head(hidden, weight, temperature, group, vocab_size, chunk_tokens, backend)
    check_targets(targets, len(hidden), head.shard.vocab_size)
    return LinearTokenLogprobs.apply(hidden, weight, targets, head, reduce_hidden_grad)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    group: ProcessGroup | None,
    vocab_size: int | None,
    chunk_tokens: int | None,
    backend: str | None,
) -> LinearHead:
    """Check the arguments of a head and return it."""
    check_head(hidden, weight)
    check_temperature(temperature)
    check_count(chunk_tokens=chunk_tokens, vocab_size=vocab_size)
    return LinearHead(
        weight.detach(),
        VocabShard.of(weight, len(weight), group, vocab_size),
        1.0 / temperature,
        chunk_tokens or default_chunk_tokens(weight),
        choose(hidden, backend),
    )


class LinearTokenLogprobs(torch.autograd.Function):
    """Computes `linear_token_logprobs` of checked arguments.

    Saved: the inputs, by reference, and three fp32 numbers per token: entropy, largest logit and
    log of the sum."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, head, reduce_hidden_grad):
        ctx.set_materialize_grads(False)
        softmax = head_softmax(head, hidden, targets)
        # The weight is saved for its version counter: an update in between is an error.
        ctx.save_for_backward(hidden, weight, targets, *softmax[1:])
        ctx.settings = head, reduce_hidden_grad
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, _, targets, *softmax = ctx.saved_tensors
        head, reduce_hidden_grad = ctx.settings
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(softmax[0])
        gradients = HeadGradients(head, hidden, ctx.needs_input_grad, reduce_hidden_grad)
        buffer = head.buffer(len(hidden), wide(hidden.dtype))
        d_buffer = buffer
        if hidden.dtype != buffer.dtype:
            d_buffer = head.buffer(len(hidden), hidden.dtype)
        for rows in head.chunks(slice(0, len(hidden))):
            states = hidden[rows]
            parts = (*softmax, grad_logprobs, grad_entropy)
            upstream = RowUpstream._make(None if part is None else part[rows] for part in parts)
            logits = head.logits(states, buffer)
            d_logits = head.gradient(logits, targets[rows], upstream, d_buffer)
            gradients.add(rows, states, d_logits)
        grad_hidden, grad_weight = gradients.finish()
        if grad_weight is not None:
            grad_weight = grad_weight.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None
