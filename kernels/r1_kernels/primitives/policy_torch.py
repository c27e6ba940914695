"""The policy loss of a flat run of tokens and its derivative, and sums over sequences, in PyTorch.

Formulae: `r1_kernels.policy_terms`."""

import torch
from torch import Tensor

from r1_kernels.policy_terms import MAX_LOG_RATIO, PolicySettings, PolicyTerms, TokenTensors
from r1_kernels.precision import accumulation_dtype


def policy_terms(tokens: TokenTensors, settings: PolicySettings) -> PolicyTerms:
    """Compute `policy_triton.policy_terms`; in fp64 for fp64 tensors."""
    dtype = accumulation_dtype(tokens.both_logprobs()[0].dtype)
    tokens = TokenTensors._make(t if t is None else t.to(dtype) for t in tokens)
    logprobs, old_logprobs = tokens.both_logprobs()
    unmasked = ~(tokens.weights <= 0)  # NaN is unmasked, and shows
    # Tokens that do not count may hold NaN: replace them before the arithmetic, not after.
    weight, advantage = (torch.where(unmasked, t, 0.0) for t in (tokens.weights, tokens.advantages))
    x = tokens.log_ratio
    if x is None:
        x = logprobs - old_logprobs
    x = torch.where(unmasked, x, 0.0)
    ratio = x.clamp(max=MAX_LOG_RATIO).exp()
    limited = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    if settings.objective == "cispo":
        clipped = limited != ratio
        by_log_ratio, by_logprob = torch.zeros_like(ratio), limited * advantage
        surrogate = by_logprob * torch.where(unmasked, logprobs, 0.0)
    else:
        surrogate, clipped = _clipped_surrogate(ratio, limited, advantage, settings.dual_clip)
        by_log_ratio = torch.where(clipped | (x > MAX_LOG_RATIO), 0.0, ratio * advantage)
        by_logprob = torch.zeros_like(ratio)
    importance = unmasked.to(dtype)
    if tokens.rollout_logprobs is not None:
        gap = torch.where(unmasked, old_logprobs - tokens.rollout_logprobs, 0.0)
        trust = gap.clamp(max=MAX_LOG_RATIO).exp().clamp(max=settings.importance_cap)
        importance = torch.where(unmasked, trust, 0.0)
    total = -importance * surrogate
    grad_logprob = -weight * importance * by_logprob
    kl = torch.zeros_like(ratio)
    if tokens.ref_logprobs is not None:
        g = torch.where(unmasked, tokens.ref_logprobs - logprobs, 0.0)
        kl, slope = _kl(g, settings.kl_estimator)
        total = total + settings.kl_beta * kl
        grad_logprob = grad_logprob + weight * settings.kl_beta * slope
    return PolicyTerms(
        loss=(weight * total).sum()[None],
        grad_log_ratio=-weight * importance * by_log_ratio,
        grad_logprob=grad_logprob,
        ratio=ratio * unmasked,
        clipped=clipped.to(dtype),
        kl=kl,
        importance=importance,
    )


def _clipped_surrogate(
    ratio: Tensor, limited: Tensor, advantage: Tensor, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return PPO's surrogate, and whether a clip is active."""
    free, bounded = ratio * advantage, limited * advantage
    clipped = bounded < free
    surrogate = torch.where(clipped, bounded, free)
    if dual_clip is not None:
        floor = dual_clip * advantage
        is_below = (advantage < 0) & (surrogate < floor)
        surrogate = torch.where(is_below, floor, surrogate)
        clipped = clipped | is_below
    return surrogate, clipped


def _kl(g: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Return the estimate from g = ref - logprob, and its derivative by the logprob."""
    if estimator == "k1":
        return -g, torch.ones_like(g)
    if estimator == "k2":
        return 0.5 * g * g, -g
    # In fp32 e^g - g - 1 is 0 for |g| < 1e-4, where policies differ least.
    capped = g.clamp(max=MAX_LOG_RATIO).double()
    rise = capped.expm1()
    slope = torch.where(g > MAX_LOG_RATIO, 0.0, -rise)
    return (rise - capped).to(g.dtype), slope.to(g.dtype)


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute `policy_triton.segment_sums`; in fp64 for fp64 values."""
    values = values.to(accumulation_dtype(values.dtype))
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0)
