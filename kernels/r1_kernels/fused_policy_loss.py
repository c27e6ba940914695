"""LM head, log-probabilities, entropy and policy loss, with gradients, as one operation.

The forward pass computes, for one chunk of tokens at a time: logits → statistics → policy loss and
its derivative → gradient of the logits → gradients of hidden states and weight. That is three
matrix products, none repeated, and one chunk of logits. The gradients are known before the backward
pass, because the loss is a weighted sum with known weights; the backward pass multiplies them by
the upstream gradient. With X the hidden states, W the weight, Z = X Wᵀ, p = softmax(c Z), L the
loss, l its tokens' log-probabilities and H their entropies:

    dZ_tj = c dL/dl_t ([j = y_t] - p_tj) - c dL/dH_t p_tj (log p_tj + H_t)
    dX = dZ W        dW = dZᵀ X, summed over chunks in fp32

With a sampling mask p, H and dZ are over the kept ids alone. dL/dl_t: `policy_terms`; dL/dH_t =
-entropy_coef · w_t. Saved for the backward pass: dX, in X's dtype, and dW, in fp32, which the
backward pass multiplies and adds to `main_grad` unrounded where there is one; for X in fp16 both
are scaled by a power of two until then (`gradient_scale`). Computing Z again there, as
`linear_token_logprobs` must, needs only X and W, but a fourth product.

The order on the device, for chunk i: logits(i), statistics(i), start of all-gather(i); the two
gradient products of chunk i - 1, which hide the all-gather; loss and d_logits(i). So one buffer
holds logits(i) and another, in hidden's dtype, d_logits(i - 1). A rank with the whole vocabulary
does not wait and, in fp32, needs only the first buffer.

One H200 took 524 ms, at 77% of the rate of three `torch.mm`, for 65,536 tokens x 7,168 x 129,280
in bf16 (one round; docs/benchmarks/gpu-h200.md).

Tokens whose mask is 0 - prompts, padding - are left out of every product. Derivations, bytes and
lower bounds: docs/kernels.md."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import check_targets, check_tensors, check_tokens
from r1_kernels.averaging import Averaging, Sequences
from r1_kernels.linear_head import HeadGradients, LinearHead, Rows, num_rows
from r1_kernels.linear_token_logprobs import LinearTokenLogprobs, make_head
from r1_kernels.policy_loss import prepare_tokens, tokens_loss
from r1_kernels.policy_terms import PolicySettings, PolicyTerms, TokenTensors
from r1_kernels.precision import accumulation_dtype, without_autocast
from r1_kernels.sampling_mask import KeptIds, SamplingMask, check_sampling_mask
from r1_kernels.vocabulary import RowSoftmax, RowUpstream


class LinearPolicyLoss(NamedTuple):
    """The result of `linear_policy_loss`. All fp32 (fp64 for fp64).

    Attributes:
        loss: (), differentiable in hidden and weight. The others have no gradient, and 0 where the
            mask is 0.
        logprobs: (T,), nats, of the targets.
        entropy: (T,), nats.
        ratio: (T,), ρ, not clipped.
        clipped: (T,), 1 where the clip is active, else 0.
        kl: (T,), the estimate.
        importance: (T,), the weight that corrects from the engine's to the trainer's policy."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    importance: Tensor


@without_autocast
def linear_policy_loss_from_settings(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tokens: TokenTensors,
    settings: PolicySettings,
    averaging: Averaging,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    sampling_mask: SamplingMask | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
    main_grad: Tensor | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> LinearPolicyLoss:
    """Compute the policy loss of T tokens of packed responses from hidden states.

    Autocast is off inside: the output layer computes in the dtype of hidden and weight.

    Args:
        hidden: (T, H) float.
        weight: (V_local, H) of the same dtype, this rank's rows.
        targets: (T,) int64 or int32 global ids.
        tokens: the tensors (T,) that the loss of a token reads, with the mask as `weights`;
            `logprobs` and `log_ratio` are None, because they are computed here.
        settings: the settings of a token's loss.
        averaging: the average over tokens and sequences.
        temperature: the logits are divided by it.
        group: the ranks that share the vocabulary, or None.
        vocab_size: ids from here on are padding; None: there is none.
        sampling_mask: the ids that the sampler kept, or None for all.
        chunk_tokens: tokens whose logits exist at once, or None.
        reduce_hidden_grad: whether the gradient of `hidden` is summed over the group.
        main_grad: (V_local, H), to which backward passes add the weight's gradient, or None.
        rows: the indices of all tokens whose mask is not 0, or None to find them here.
        backend: "triton", "torch" or None.

    Returns:
        The loss, and each token's terms.

    Raises:
        ValueError: shapes, dtypes, devices, targets and settings that do not fit, by name."""
    if tokens.logprobs is not None or tokens.log_ratio is not None:
        raise ValueError("tokens.logprobs and tokens.log_ratio are computed here; leave them None")
    check_tensors(
        hidden=hidden,
        weight=weight,
        targets=targets,
        advantages=tokens.advantages,
        mask=tokens.weights,
    )
    head = make_head(
        hidden, weight, temperature, group, vocab_size, chunk_tokens, backend, main_grad
    )
    call = _check_arguments(head, hidden, targets, sampling_mask, tokens, rows, settings, averaging)
    compute = _with_sequence_ratios if averaging.ratio_level == "sequence" else _with_token_ratios
    return compute(hidden, weight, call, reduce_hidden_grad)


class _LossArguments(NamedTuple):
    """The arguments of one call besides hidden and weight, checked."""

    head: LinearHead
    """The output layer."""
    targets: Tensor
    """(T,) global ids."""
    kept_ids: KeptIds | None
    """The ids that each of the T tokens keeps, or None for all."""
    tokens: TokenTensors
    """The tensors per token, detached."""
    rows: Rows
    """The tokens whose mask is not 0: slice(0, T) if these are all, else their indices."""
    sequences: Sequences | None
    """What `average` and `ratio_level` need of the sequences, or None if they need nothing."""
    settings: PolicySettings
    """The settings of a token's loss."""
    gradient_scale: Tensor | None
    """A scalar by which gradients are multiplied until the backward pass, or None."""

    def kept_ids_of(self, rows: Rows) -> KeptIds | None:
        """Return the kept ids of one chunk, or None for all."""
        return None if self.kept_ids is None else self.kept_ids.select(rows)

    def terms(self, rows: Rows, softmax: RowSoftmax) -> PolicyTerms:
        """Compute the loss of one chunk and its derivatives by the log-probabilities."""
        parts = [None if tensor is None else tensor[rows] for tensor in self.tokens]
        chunk = TokenTensors._make(parts)._replace(logprobs=softmax.logprobs)
        if chunk.old_logprobs is None:
            chunk = chunk._replace(old_logprobs=softmax.logprobs)
        terms = self.head.primitives.policy_terms(chunk, self.settings)
        if self.settings.entropy_coef:
            bonus = self.settings.entropy_coef * chunk.weights * softmax.entropy
            terms = terms._replace(loss=torch.cat([terms.loss, -bonus.sum()[None]]))
        return terms

    def d_logits(
        self, rows: Rows, logits: Tensor, softmax: RowSoftmax, terms: PolicyTerms, out: Tensor
    ) -> Tensor:
        """Compute the gradient of one chunk's logits in `out`."""
        grad_entropy = None
        if self.settings.entropy_coef:
            grad_entropy = -self.settings.entropy_coef * self.tokens.weights[rows]
        grad_logprobs = terms.grad_log_ratio + terms.grad_logprob
        if self.gradient_scale is not None:
            grad_logprobs = grad_logprobs * self.gradient_scale
            if grad_entropy is not None:
                grad_entropy = grad_entropy * self.gradient_scale
        upstream = RowUpstream(*softmax[1:], grad_logprobs, grad_entropy)
        return self.head.gradient(logits, self.targets[rows], upstream, self.kept_ids_of(rows), out)


def _check_arguments(
    head: LinearHead,
    hidden: Tensor,
    targets: Tensor,
    sampling_mask: SamplingMask | None,
    inputs: TokenTensors,
    rows: Tensor | None,
    settings: PolicySettings,
    averaging: Averaging,
) -> _LossArguments:
    """Check the arguments of one call and return them.

    `inputs` has the caller's tensors, with the mask as `weights`; `rows` the indices of the tokens
    whose mask is not 0, or None to find them."""
    check_tokens(len(hidden), advantages=inputs.advantages)
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows must be (tokens,) int64, got {tuple(rows.shape)} {rows.dtype}")
    on_one_device = {"hidden": hidden, "weight": head.weight, "targets": targets}
    tokens, sequences = prepare_tokens(
        inputs,
        settings,
        averaging,
        head.primitives,
        accumulation_dtype(hidden.dtype),
        **on_one_device,
    )
    rows = tokens.weights.nonzero()[:, 0] if rows is None else rows
    counts_all = len(rows) == len(hidden)
    counted_rows = None if counts_all else rows
    check_targets(targets, len(hidden), head.shard.vocab_size, counted_rows)
    return _LossArguments(
        head,
        targets,
        check_sampling_mask(sampling_mask, targets, head.shard.vocab_size, counted_rows),
        tokens,
        # A slice gives views of the tensors, where indices would copy them.
        slice(0, len(hidden)) if counts_all else rows,
        sequences,
        settings,
        _gradient_scale(tokens.weights) if hidden.dtype == torch.float16 else None,
    )


def _gradient_scale(weights: Tensor) -> Tensor:
    """Return the power of two (a scalar) that brings the largest token weight to 0.5 to 1.

    Gradients in fp16 below 6e-8 are 0, and a caller's loss scale comes only with the backward pass:
    with weights of 1 / 65,536 and 32,768 logits, two thirds of the weight's gradient would be 0."""
    max_weight = torch.cat([weights.float(), weights.new_zeros(1, dtype=torch.float32)]).amax()
    return torch.ldexp(torch.ones_like(max_weight), -torch.frexp(max_weight).exponent)


def _with_token_ratios(
    hidden: Tensor, weight: Tensor, call: _LossArguments, reduce_hidden_grad: bool
) -> LinearPolicyLoss:
    """Compute the loss and its gradients in one pass over the head."""
    # Inside the Function the grad mode is always off, so it is read here.
    needs_grad = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    gradients = HeadGradients(call.head, hidden, needs_grad, reduce_hidden_grad)
    return LinearPolicyLoss(*_FusedLossFunction.apply(hidden, weight, call, gradients))


class _FusedLossFunction(torch.autograd.Function):
    """The loss of one `_LossArguments`, whose gradients the forward pass computes and saves."""

    @staticmethod
    def forward(ctx, hidden, weight, call, gradients):
        head = call.head
        dtype = accumulation_dtype(hidden.dtype)
        num_tokens = num_rows(call.rows)
        buffer = head.buffer(num_tokens, dtype)
        is_unsharded = head.shard.group is None
        d_buffer = buffer
        if gradients.needed and not (is_unsharded and hidden.dtype == dtype):
            d_buffer = head.buffer(num_tokens, hidden.dtype)
        metrics = [hidden.new_zeros(len(hidden), dtype=dtype) for _ in LinearPolicyLoss._fields[1:]]
        losses = [hidden.new_zeros(1, dtype=dtype)]
        previous_chunk: tuple[Rows, Tensor, Tensor] | None = None
        for rows in head.chunks(call.rows):
            states = hidden[rows]
            logits = head.logits(states, buffer)
            statistics = head.statistics(logits, call.targets[rows], call.kept_ids_of(rows))
            if previous_chunk:
                gradients.add(*previous_chunk)  # hides the all-gather of the statistics
            softmax = statistics.wait()
            terms = call.terms(rows, softmax)
            if gradients.needed:
                previous_chunk = rows, states, call.d_logits(rows, logits, softmax, terms, d_buffer)
                if is_unsharded:
                    gradients.add(*previous_chunk)
                    previous_chunk = None
            losses.append(terms.loss)
            for metric, part in zip(metrics, (*softmax[:2], *terms[3:]), strict=True):
                metric[rows] = part
        if previous_chunk:
            gradients.add(*previous_chunk)
        ctx.save_for_backward(*gradients.finish())
        ctx.head, ctx.gradient_scale = head, call.gradient_scale
        ctx.mark_non_differentiable(*metrics)
        return torch.cat(losses).sum(), *metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.gradient_scale is not None:
            upstream = upstream / ctx.gradient_scale
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream).to(grad_hidden.dtype)
        head = ctx.head
        if grad_weight is not None and head.main_grad is not None:
            torch.addcmul(head.main_grad, grad_weight, upstream, out=head.main_grad)
            grad_weight = head.no_gradient()
        elif grad_weight is not None:
            out = torch.empty_like(grad_weight, dtype=head.weight.dtype)
            grad_weight = torch.mul(grad_weight, upstream, out=out)
        return grad_hidden, grad_weight, None, None


def _with_sequence_ratios(
    hidden: Tensor, weight: Tensor, call: _LossArguments, reduce_hidden_grad: bool
) -> LinearPolicyLoss:
    """Compute the loss whose ratios need all log-probabilities first: two passes over the head."""
    rows, tokens, head = call.rows, call.tokens, call.head
    logprobs, entropy = LinearTokenLogprobs.apply(
        hidden[rows], weight, call.targets[rows], head, call.kept_ids_of(rows), reduce_hidden_grad
    )
    if not isinstance(rows, slice):
        # Tokens that do not count keep 0, and their hidden states a gradient of 0.
        zeros = logprobs.new_zeros(len(hidden))
        logprobs, entropy = (zeros.index_copy(0, rows, part) for part in (logprobs, entropy))
    tokens = tokens._replace(logprobs=logprobs.detach())
    if tokens.old_logprobs is None:
        tokens = tokens._replace(old_logprobs=tokens.logprobs)
    loss, *metrics = tokens_loss(
        logprobs, entropy, tokens, call.settings, call.sequences, head.primitives
    )
    return LinearPolicyLoss(loss, logprobs.detach(), entropy.detach(), *metrics)
