"""Token log-probabilities and entropy from hidden states, without the logits of all tokens.

Vocabulary-parallel. Without a gradient: one matrix product, whose result exists for one chunk at a
time. With a gradient, the backward pass computes each chunk's logits again (four products in all),
because the upstream gradient is not known before; where it is known, `linear_policy_loss` needs
three. The gradient of the logits is that of `token_logprobs`."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import (
    check_count,
    check_head,
    check_main_grad,
    check_same_device,
    check_targets,
    check_temperature,
)
from r1_kernels.linear_head import HeadGradients, LinearHead, default_chunk_tokens, head_softmax
from r1_kernels.precision import accumulation_dtype, without_autocast
from r1_kernels.registry import choose_primitives
from r1_kernels.sampling_mask import SamplingMask, check_sampling_mask
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
    sampling_mask: SamplingMask | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
    main_grad: Tensor | None = None,
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
        sampling_mask: the ids that the sampler kept at each token; None: the whole vocabulary.
        chunk_tokens: tokens whose logits exist at once; None: chosen by device and vocabulary.
        reduce_hidden_grad: whether the gradient of `hidden` is summed over the group; False leaves
            this rank's part, for callers that sum it themselves, as Megatron's tensor-parallel
            regions do.
        main_grad: (V_local, H) fp32 (fp64 for fp64), to which backward passes add the weight's
            gradient, unrounded; `weight` itself gets zeros. Megatron keeps such sums over
            micro-batches. None: `weight` gets the gradient, in its dtype.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        logprobs and entropy, (T,) each, as of `token_logprobs`.

    Raises:
        ValueError: shapes, dtypes, devices, targets, a sampling mask and a temperature that do not
            fit."""
    check_same_device(hidden=hidden, weight=weight, targets=targets)
    head = make_head(
        hidden, weight, temperature, group, vocab_size, chunk_tokens, backend, main_grad
    )
    check_targets(targets, len(hidden), head.shard.vocab_size)
    kept_ids = check_sampling_mask(sampling_mask, targets, head.shard.vocab_size)
    return LinearTokenLogprobs.apply(hidden, weight, targets, head, kept_ids, reduce_hidden_grad)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    group: ProcessGroup | None,
    vocab_size: int | None,
    chunk_tokens: int | None,
    backend: str | None,
    main_grad: Tensor | None = None,
) -> LinearHead:
    """Check the arguments of a head and return it.

    Args:
        hidden: (T, H).
        weight: (V_local, H).
        temperature: the logits' divisor.
        group: the ranks that share the vocabulary; None: this one alone.
        vocab_size: the ids in the whole vocabulary; None: one for each column of all ranks.
        chunk_tokens: the tokens with logits at once; None: `default_chunk_tokens`.
        backend: the implementation, as for `registry.choose_primitives`.
        main_grad: (V_local, H), what backward passes add the weight's gradient to; None: nothing.

    Raises:
        ValueError: arguments that do not fit, by name."""
    check_head(hidden, weight)
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    check_temperature(temperature)
    check_count(chunk_tokens=chunk_tokens, vocab_size=vocab_size)
    return LinearHead(
        weight.detach(),
        VocabShard.from_columns(weight, len(weight), group, vocab_size),
        1.0 / temperature,
        chunk_tokens or default_chunk_tokens(weight),
        choose_primitives(hidden, backend),
        main_grad,
    )


class LinearTokenLogprobs(torch.autograd.Function):
    """Computes `linear_token_logprobs` of checked arguments.

    Saved: the inputs, by reference, and three fp32 numbers per token: entropy, largest logit and
    log of the sum."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, head, kept_ids, reduce_hidden_grad):
        """Compute log-probabilities and entropy; keep the softmax of each row.

        Args:
            ctx: autograd's context.
            hidden: (T, H) float.
            weight: (V_local, H), which gets the gradient.
            targets: (T,) integers, ids of the whole vocabulary.
            head: the checked `LinearHead`.
            kept_ids: the tokens that each row's softmax is over; None: all.
            reduce_hidden_grad: whether the gradient of hidden is summed over the group.

        Returns:
            Log-probabilities and entropy, each (T,) fp32."""
        ctx.set_materialize_grads(False)
        softmax = head_softmax(head, hidden, targets, kept_ids)
        # The weight is saved for its version counter: an update in between is an error.
        ctx.save_for_backward(hidden, weight, targets, *softmax[1:])
        ctx.settings = head, kept_ids, reduce_hidden_grad
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, grad_logprobs, grad_entropy):
        """Return the gradients of `hidden` and `weight`, computed chunk by chunk.

        Args:
            ctx: autograd's context.
            grad_logprobs: (T,), the upstream gradient of the log-probabilities, or None.
            grad_entropy: (T,), that of the entropies, or None.

        Returns:
            (T, H) and (V_local, H) of their dtype, or None where not needed, and None for each of
            `forward`'s other arguments."""
        hidden, _, targets, *softmax = ctx.saved_tensors
        head, kept_ids, reduce_hidden_grad = ctx.settings
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(softmax[0])
        gradients = HeadGradients(
            head, hidden, ctx.needs_input_grad, reduce_hidden_grad, head.main_grad
        )
        buffer = head.buffer(len(hidden), accumulation_dtype(hidden.dtype))
        d_buffer = buffer
        if hidden.dtype != buffer.dtype:
            d_buffer = head.buffer(len(hidden), hidden.dtype)
        for rows in head.chunks(slice(0, len(hidden))):
            states = hidden[rows]
            parts = (*softmax, grad_logprobs, grad_entropy)
            upstream = RowUpstream._make(None if part is None else part[rows] for part in parts)
            logits = head.logits(states, buffer)
            chunk_kept_ids = None if kept_ids is None else kept_ids.select(rows)
            d_logits = head.gradient(logits, targets[rows], upstream, chunk_kept_ids, d_buffer)
            gradients.add(rows, states, d_logits)
        grad_hidden, grad_weight = gradients.finish()
        if grad_weight is not None:
            into_main = head.main_grad is not None
            grad_weight = head.no_gradient() if into_main else grad_weight.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None
