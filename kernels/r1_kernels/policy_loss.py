"""The clipped policy-gradient loss of PPO, GRPO, DAPO, GSPO and CISPO, from log-probabilities.

It is averaged at token or sequence level over packed sequences (`averaging`).

One pass over the tokens computes the loss, its derivative and every metric (formulae:
`policy_terms`); the backward pass multiplies by the upstream gradient. With a sequence-level ratio
(GSPO, arXiv 2507.18071 eq. 7), x is its mean over the unmasked tokens of the sequence, and its
derivative is the mean over the sequence."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import check_floats, check_same_device, check_tensors, check_tokens
from r1_kernels.averaging import Averaging, Level, Sequences
from r1_kernels.policy_terms import (
    DEFAULTS,
    KLEstimator,
    Objective,
    PolicySettings,
    PolicyTerms,
    TokenTensors,
)
from r1_kernels.precision import accumulation_dtype
from r1_kernels.registry import Primitives, choose_primitives


class PolicyLoss(NamedTuple):
    """The result of `policy_loss`. All fp32 (fp64 for fp64).

    Attributes:
        loss: (), differentiable. The others are (T,) without gradient, 0 where the mask is 0.
        ratio: ρ, not clipped.
        clipped: 1 where the clip is active, else 0.
        kl: the estimate.
        importance: v, the weight that corrects from the engine's to the trainer's policy."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    importance: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    # The loss of a token: `PolicySettings`, and what its terms read.
    clip_low: float = DEFAULTS.clip_low,
    clip_high: float = DEFAULTS.clip_high,
    dual_clip: float | None = DEFAULTS.dual_clip,
    kl_beta: float = DEFAULTS.kl_beta,
    kl_estimator: KLEstimator = DEFAULTS.kl_estimator,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = DEFAULTS.importance_cap,
    objective: Objective = DEFAULTS.objective,
    entropy: Tensor | None = None,
    entropy_coef: float = DEFAULTS.entropy_coef,
    # Sequences, and the average over tokens: `Averaging`.
    ratio_level: Level = "token",
    average: Level = "token",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: ProcessGroup | None = None,
    # How it is computed: None for Triton on CUDA tensors, PyTorch elsewhere.
    backend: str | None = None,
) -> PolicyLoss:
    """Compute the loss of T tokens of packed responses; differentiable in logprobs and entropy.

    The formulae are in `policy_terms`.

    Args:
        logprobs: (T,) float, nats, of the policy that is trained.
        old_logprobs: (T,), or None for logprobs themselves (ratio 1, the one update of an on-policy
            step).
        ref_logprobs: (T,), or None with kl_beta 0.
        advantages: (T,) float.
        mask: (T,) bool, integers or float weights ≥ 0; a token with 0 does not count and may hold
            NaN.
        clip_low: ε below 1; 10, DeepSeek-R1's, hardly clips, where PPO's is 0.2.
        clip_high: ε above 1.
        dual_clip: the largest ratio of a negative advantage, above 1; None: no limit.
        kl_beta: the weight of the KL estimate; the default is DeepSeek-R1's.
        kl_estimator: "k1", "k2" or "k3".
        rollout_logprobs: (T,), the engine's, or None for no correction.
        importance_cap: the largest weight of that correction, inf for no limit; None, without
            rollout_logprobs: tokens are not weighed.
        objective: "ppo" or "cispo".
        entropy: (T,), nats, for a bonus of entropy_coef · entropy.
        entropy_coef: the weight of that bonus.
        ratio_level: "token", or "sequence" (GSPO).
        average: "token" or "sequence", see `Averaging.weights`.
        denominator: the number, above 0, that the sum is divided by; 1 gives the sum; None: Σ mask,
            or with average "sequence" the number of responses with an unmasked token.
        cu_seqlens: (S + 1,) integers, the borders of the responses from 0 to T, for ratio_level or
            average "sequence".
        sequence_group: ranks that each hold some tokens of every response, as in context
            parallelism (cu_seqlens: the borders in this rank's T; the losses of the ranks add up);
            needs a denominator.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        The loss, and each token's terms.

    Raises:
        ValueError: shapes, dtypes, devices and settings that do not fit, by name."""
    check_tensors(logprobs=logprobs, advantages=advantages, mask=mask)
    _check_logprobs(logprobs, entropy, entropy_coef)
    settings = PolicySettings(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
        importance_cap=importance_cap,
        objective=objective,
        entropy_coef=entropy_coef,
    )
    averaging = Averaging(ratio_level, average, denominator, cu_seqlens, sequence_group)
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    inputs = TokenTensors(logprobs, old_logprobs, ref_logprobs, rollout_logprobs, advantages, mask)
    primitives = choose_primitives(logprobs, backend)
    tokens, sequences = prepare_tokens(
        inputs, settings, averaging, primitives, accumulation_dtype(logprobs.dtype), entropy=entropy
    )
    level = sequences if ratio_level == "sequence" else None
    return tokens_loss(logprobs, entropy, tokens, settings, level, primitives)


def _check_logprobs(logprobs: Tensor, entropy: Tensor | None, entropy_coef: float) -> None:
    """Require logprobs (T,), and an entropy (T,) where it has a coefficient."""
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must be (T,), got {tuple(logprobs.shape)}: flatten the batch")
    check_tokens(len(logprobs), entropy=entropy)
    check_floats(logprobs=logprobs, entropy=entropy)
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, but there is no entropy")


def prepare_tokens(
    inputs: TokenTensors,
    settings: PolicySettings,
    averaging: Averaging,
    primitives: Primitives,
    dtype: torch.dtype,
    **further_tensors: Tensor | None,
) -> tuple[TokenTensors, Sequences | None]:
    """Check the tensors of one batch. Return them detached, with weights of `dtype` for the mask.

    Args:
        inputs: the caller's tensors, with the mask as `weights`.
        settings: those of the loss.
        averaging: how the loss is averaged.
        primitives: the implementation that will compute the loss.
        dtype: the dtype of the returned weights.
        **further_tensors: those that must be on the same device.

    Raises:
        ValueError: tensors and settings that do not fit, by name."""
    tensors = inputs._asdict()
    mask = tensors.pop("weights")
    num_tokens = len(inputs.advantages if inputs.logprobs is None else inputs.logprobs)
    check_tokens(num_tokens, **tensors, mask=mask)
    check_same_device(**further_tensors, **tensors, mask=mask, cu_seqlens=averaging.cu_seqlens)
    check_floats(**tensors)
    settings.check(inputs.ref_logprobs, inputs.rollout_logprobs)
    sequences = averaging.sequences(num_tokens, primitives)
    weights = averaging.weights(mask, sequences, dtype)
    detached_inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    return TokenTensors._make(detached_inputs)._replace(weights=weights), sequences


def tokens_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: TokenTensors,
    settings: PolicySettings,
    sequences: Sequences | None,
    primitives: Primitives,
) -> PolicyLoss:
    """Compute `policy_loss` of prepared tokens.

    Args:
        logprobs: (T,), with gradient.
        entropy: (T,), or None.
        tokens: the other tensors, each (T,).
        settings: the settings of the loss.
        sequences: those whose ratio is one number, or None.
        primitives: the implementation."""
    if sequences is None:
        terms = primitives.policy_terms(tokens, settings)
        grad = terms.grad_log_ratio + terms.grad_logprob
    else:
        terms, grad = _with_sequence_ratios(tokens, settings, sequences, primitives)
    bonus = settings.entropy_coef * tokens.weights if settings.entropy_coef else None
    loss = _Loss.apply(logprobs, entropy, terms.loss, grad, bonus)
    return PolicyLoss(loss, terms.ratio, terms.clipped, terms.kl, terms.importance)


def _with_sequence_ratios(
    tokens: TokenTensors,
    settings: PolicySettings,
    sequences: Sequences,
    primitives: Primitives,
) -> tuple[PolicyTerms, Tensor]:
    """Return the terms, and the derivative (T,) of the loss by the log-probabilities."""
    unmasked = ~(tokens.weights <= 0)
    logprobs, old_logprobs = tokens.both_logprobs()
    dtype = accumulation_dtype(logprobs.dtype)
    log_ratio = logprobs.to(dtype) - old_logprobs.to(dtype)
    terms = primitives.policy_terms(
        tokens._replace(log_ratio=sequences.means(log_ratio, unmasked)), settings
    )
    # All tokens of a sequence have the same x, a mean to which each unmasked token adds 1 / |o|.
    total = sequences.sums(terms.grad_log_ratio)
    count = sequences.sums(unmasked.to(total.dtype)).clamp(min=1)
    shared_gradient = torch.where(unmasked, sequences.spread(total / count), 0.0)
    return terms, shared_gradient + terms.grad_logprob


class _Loss(torch.autograd.Function):
    """Compute Σ loss_terms - bonus · entropy; `grad` is its derivative by the logprobs.

    Saved: `grad` and `bonus`, (T,) each; the backward pass reads no input again."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss_terms, grad, bonus):
        ctx.save_for_backward(grad, bonus)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        loss = loss_terms.sum()
        if bonus is not None:
            loss = loss - torch.where(bonus == 0, 0.0, bonus * entropy).sum()
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        grad, bonus = ctx.saved_tensors
        logprobs_dtype, entropy_dtype = ctx.dtypes
        grad_entropy = None if bonus is None else (-bonus * upstream).to(entropy_dtype)
        return (grad * upstream).to(logprobs_dtype), grad_entropy, None, None, None
