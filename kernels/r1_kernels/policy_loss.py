"""The clipped policy-gradient loss of PPO, GRPO, DAPO, GSPO and CISPO, from log-probabilities.

One pass over the tokens computes the loss, its derivative and every metric (formulae:
`policy_terms`); the backward pass multiplies by the upstream gradient. With a sequence-level ratio
(GSPO, arXiv 2507.18071 eq. 7), x is its mean over the seen tokens of the sequence, and its
derivative is added up over the sequence and shared out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import check_floats, check_same_device, check_tensors, check_tokens
from r1_kernels.averaging import (
    Sequences,
    find_sequences,
    sequence_group_of,
    token_weights,
)
from r1_kernels.backends import choose
from r1_kernels.gemm import wide
from r1_kernels.policy_terms import PolicySettings, PolicyTerms, TokenTensors


class PolicyLoss(NamedTuple):
    """loss: (); the rest (T,) without gradient, 0 where the mask is 0. All fp32 (fp64 for fp64).

    ratio: ρ, not clipped; clipped: 1 where a clip holds the token back, else 0; kl: the estimate;
    importance: v, the weight of the engine-to-trainer correction."""

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
    clip_low: float = 10.0,
    clip_high: float = 10.0,
    dual_clip: float | None = None,
    kl_beta: float = 0.001,
    kl_estimator: str = "k3",
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = 2.0,
    objective: str = "ppo",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ratio_level: str = "token",
    average: str = "token",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The loss of (T,) tokens of packed outputs; differentiable in logprobs and entropy.

    logprobs, advantages: (T,) float; old_logprobs: (T,), or None for logprobs themselves (ratio 1,
    the one update of an on-policy step); ref_logprobs: (T,) or None with kl_beta 0;
    rollout_logprobs: (T,), the engine's, or None for no correction; mask: (T,) bool, integers or
    float weights ≥ 0, where 0 hides a token whatever it holds; entropy: (T,), for a bonus of
    entropy_coef · entropy; cu_seqlens: (S + 1,) borders of the outputs, for ratio_level or average
    "sequence"; sequence_group: ranks that each hold some tokens of every output, as context
    parallelism spreads them (cu_seqlens: the borders in this rank's T; the losses of the ranks add
    up). average and denominator: see `averaging.token_weights`; denominator=1 gives the sum.
    clip_low, clip_high: ε on either side; 10, DeepSeek-R1's, hardly clips, where PPO's is 0.2.
    Formulae and the other settings: `policy_terms`.
    Raises ValueError for shapes, dtypes, devices and settings that do not fit, by name.
    """
    check_tensors(logprobs=logprobs, advantages=advantages, mask=mask)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    tensors = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must be (T,), got {tuple(logprobs.shape)}: flatten the batch")
    check_tokens(len(logprobs), **tensors, mask=mask)
    check_same_device(logprobs=logprobs, **tensors, mask=mask, cu_seqlens=cu_seqlens)
    check_floats(logprobs=logprobs, **tensors)
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, but there is no entropy")
    settings = PolicySettings(
        clip_low, clip_high, dual_clip, kl_beta, kl_estimator, importance_cap, objective
    )
    settings.check(ref_logprobs)
    primitives = choose(logprobs, backend)
    group = sequence_group_of(sequence_group, denominator)
    sequences = find_sequences(cu_seqlens, len(logprobs), average, ratio_level, primitives, group)
    tokens = TokenTensors(
        logprobs.detach(),
        old_logprobs.detach(),
        None if ref_logprobs is None else ref_logprobs.detach(),
        None if rollout_logprobs is None else rollout_logprobs.detach(),
        advantages.detach(),
        token_weights(mask, average, denominator, sequences, wide(logprobs.dtype)),
    )
    terms, grad = _with_ratio_level(tokens, settings, ratio_level, sequences, primitives)
    bonus = entropy_coef * tokens.weights if entropy_coef else None
    loss = _Loss.apply(logprobs, entropy, terms.loss, grad, bonus)
    return PolicyLoss(loss, terms.ratio, terms.clipped, terms.kl, terms.importance)


def _with_ratio_level(
    tokens: TokenTensors,
    settings: PolicySettings,
    level: str,
    sequences: Sequences | None,
    primitives,
) -> tuple[PolicyTerms, Tensor]:
    """The terms, and the derivative (T,) of the loss by the log-probabilities."""
    if level == "token":
        terms = primitives.policy_terms(tokens, settings)
        return terms, terms.grad_ratio + terms.grad_logprob
    seen = ~(tokens.weights <= 0)
    dtype = wide(tokens.logprobs.dtype)
    gap = tokens.logprobs.to(dtype) - tokens.old_logprobs.to(dtype)
    terms = primitives.policy_terms(tokens._replace(log_ratio=sequences.means(gap, seen)), settings)
    # Every token's x is the same mean, to which each seen token gave 1 / |o|.
    total = sequences.sums(terms.grad_ratio)
    count = sequences.sums(seen.to(total.dtype)).clamp(min=1)
    shared = torch.where(seen, sequences.spread(total / count), 0.0)
    return terms, shared + terms.grad_logprob


class _Loss(torch.autograd.Function):
    """Σ loss_terms - bonus · entropy, whose derivative by logprobs is already known."""

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
