"""The policy loss of a flat run of tokens and its derivative, and sums over sequences, in PyTorch.

Formulae: `r1_kernels.policy_terms`."""

import torch
from torch import Tensor

from r1_kernels.policy_terms import (
    MAX_LOG_RATIO,
    KLEstimator,
    PolicySettings,
    PolicyTerms,
    TokenTensors,
)
from r1_kernels.precision import accumulation_dtype


def policy_terms(tokens: TokenTensors, settings: PolicySettings) -> PolicyTerms:
    """Compute `policy_triton.policy_terms`; in fp64 for fp64 tensors."""
    dtype = accumulation_dtype(tokens.both_logprobs()[0].dtype)
    tokens = TokenTensors._make(t if t is None else t.to(dtype) for t in tokens)
    logprobs, old_logprobs = tokens.both_logprobs()
    unmasked = ~(tokens.weights <= 0)  # NaN is unmasked, and shows
    # Tokens that do not count may hold NaN: replace them before the arithmetic, not after.
    weight, advantage = (torch.where(unmasked, t, 0.0) for t in (tokens.weights, tokens.advantages))
    log_ratio = tokens.log_ratio
    if log_ratio is None:
        log_ratio = logprobs - old_logprobs
    log_ratio = torch.where(unmasked, log_ratio, 0.0)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    if settings.objective == "cispo":
        is_clipped = clipped_ratio != ratio
        surrogate = clipped_ratio * advantage * torch.where(unmasked, logprobs, 0.0)
        d_log_ratio, d_logprob = torch.zeros_like(ratio), clipped_ratio * advantage
    else:
        surrogate, is_clipped = _ppo_surrogate(ratio, clipped_ratio, advantage, settings.dual_clip)
        is_constant = is_clipped | (log_ratio > MAX_LOG_RATIO)
        d_log_ratio = torch.where(is_constant, 0.0, ratio * advantage)
        d_logprob = torch.zeros_like(ratio)
    importance = unmasked.to(dtype)
    if tokens.rollout_logprobs is not None:
        rollout_log_ratio = torch.where(unmasked, old_logprobs - tokens.rollout_logprobs, 0.0)
        rollout_ratio = rollout_log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        importance = torch.where(unmasked, rollout_ratio.clamp(max=settings.importance_cap), 0.0)
    token_loss = -importance * surrogate
    grad_logprob = -weight * importance * d_logprob
    kl = torch.zeros_like(ratio)
    if tokens.ref_logprobs is not None:
        g = torch.where(unmasked, tokens.ref_logprobs - logprobs, 0.0)
        kl, d_kl = _kl_estimate(g, settings.kl_estimator)
        token_loss = token_loss + settings.kl_beta * kl
        grad_logprob = grad_logprob + weight * settings.kl_beta * d_kl
    return PolicyTerms(
        loss=(weight * token_loss).sum()[None],
        grad_log_ratio=-weight * importance * d_log_ratio,
        grad_logprob=grad_logprob,
        ratio=ratio * unmasked,
        clipped=is_clipped.to(dtype),
        kl=kl,
        importance=importance,
    )


def _ppo_surrogate(
    ratio: Tensor, clipped_ratio: Tensor, advantage: Tensor, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return min(ρ A, clip(ρ) A), at least dual_clip A where A < 0, and whether it is clipped."""
    unclipped, clipped = ratio * advantage, clipped_ratio * advantage
    is_clipped = clipped < unclipped
    surrogate = torch.where(is_clipped, clipped, unclipped)
    if dual_clip is not None:
        lower_bound = dual_clip * advantage
        is_below = (advantage < 0) & (surrogate < lower_bound)
        surrogate = torch.where(is_below, lower_bound, surrogate)
        is_clipped = is_clipped | is_below
    return surrogate, is_clipped


def _kl_estimate(g: Tensor, estimator: KLEstimator) -> tuple[Tensor, Tensor]:
    """Return the estimate from g = ref - logprob, and its derivative by the log-probability."""
    if estimator == "k1":
        return -g, torch.ones_like(g)
    if estimator == "k2":
        return 0.5 * g * g, -g
    # In fp32 e^g - g - 1 is 0 for |g| < 1e-4, where policies differ least.
    capped = g.clamp(max=MAX_LOG_RATIO).double()
    rise = capped.expm1()
    d_kl = torch.where(g > MAX_LOG_RATIO, 0.0, -rise)
    return (rise - capped).to(g.dtype), d_kl.to(g.dtype)


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute `policy_triton.segment_sums`; in fp64 for fp64 values."""
    values = values.to(accumulation_dtype(values.dtype))
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0)
