"""The policy loss of a flat run of tokens and its derivative: one pass, each input read once.

Formulae: `r1_kernels.policy_terms`. Each program sums the loss of its own block; the few partial
sums are added outside, in one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1_kernels.policy_terms import (
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    PolicySettings,
    PolicyTerms,
    TokenTensors,
)

# 4 floats per thread, one 16-byte load of each input. 65,536 tokens are 128 programs, about one per
# SM of an H200. At most 3.4 MB are moved, so the time is that of one program; with 8 floats per
# thread it would have twice the work, in 90 registers instead of 54, and half the SMs would idle.
BLOCK = 512
NUM_WARPS = 4
MAX_EXPONENT = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _read(tensor, token, inside):
    return tl.load(tensor + token, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _limited(ratio, clip_low, clip_high):
    """Return the clipped ratio, and whether it differs from the ratio."""
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    limited = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    return limited, limited != ratio


@triton.jit
def _surrogate(ratio, advantage, clip_low, clip_high, dual_clip, HAS_DUAL_CLIP: tl.constexpr):
    """Return PPO's surrogate, and whether a clip is active."""
    free = ratio * advantage
    limited, _ = _limited(ratio, clip_low, clip_high)
    limited = limited * advantage
    clipped = limited < free
    surrogate = tl.where(clipped, limited, free)
    if HAS_DUAL_CLIP:
        floor = dual_clip * advantage
        below = (advantage < 0.0) & (surrogate < floor)
        surrogate = tl.where(below, floor, surrogate)
        clipped = clipped | below
    return surrogate, clipped


@triton.jit
def _kl(g, ESTIMATOR: tl.constexpr):
    """Return estimate 1 to 3 of KL at g = ref_logprob - logprob, and its derivative by logprob."""
    if ESTIMATOR == 1:
        kl = -g
        slope = tl.full(g.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        kl = 0.5 * g * g
        slope = -g
    else:
        capped = tl.where(g > MAX_EXPONENT, MAX_EXPONENT, g)
        e = tl.exp(capped)
        kl = e - capped - 1.0
        slope = tl.where(g > MAX_EXPONENT, 0.0, 1.0 - e)
    return kl, slope


@triton.jit
def policy_terms_kernel(
    logprobs,  # in: (T,) any float
    old_logprobs,  # in: (T,) any float
    ref_logprobs,  # in: (T,) any float, read only with HAS_REF
    rollout_logprobs,  # in: (T,) any float, read only with HAS_ROLLOUT
    advantages,  # in: (T,) any float
    weights,  # in: (T,) any float
    log_ratio,  # in: (T,) any float, read only with HAS_LOG_RATIO
    loss,  # out: (blocks,) fp32
    outputs,  # out: (6, T) fp32: grad_ratio, grad_logprob, ratio, clipped, kl, importance
    num_tokens,
    clip_low,
    clip_high,
    dual_clip,
    kl_beta,
    importance_cap,
    ESTIMATOR: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_LOG_RATIO: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    IS_CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    weight = _read(weights, token, inside)
    logprob = _read(logprobs, token, inside)
    old = _read(old_logprobs, token, inside)
    advantage = _read(advantages, token, inside)
    x = logprob - old
    if HAS_LOG_RATIO:
        x = _read(log_ratio, token, inside)
    if HAS_ROLLOUT:
        rollout = _read(rollout_logprobs, token, inside)
    if HAS_REF:
        ref = _read(ref_logprobs, token, inside)
    seen = (weight > 0.0) | (weight != weight)
    weight = tl.where(seen, weight, 0.0)
    advantage = tl.where(seen, advantage, 0.0)
    x = tl.where(seen, x, 0.0)
    ratio = tl.exp(tl.where(x > MAX_EXPONENT, MAX_EXPONENT, x))
    if IS_CISPO:
        limited, clipped = _limited(ratio, clip_low, clip_high)
        by_logprob = limited * advantage
        surrogate = by_logprob * tl.where(seen, logprob, 0.0)
    else:
        surrogate, clipped = _surrogate(
            ratio, advantage, clip_low, clip_high, dual_clip, HAS_DUAL_CLIP
        )
    importance = tl.where(seen, 1.0, 0.0)
    if HAS_ROLLOUT:
        gap = old - rollout
        trust = tl.exp(tl.where(gap > MAX_EXPONENT, MAX_EXPONENT, gap))
        trust = tl.where(trust > importance_cap, importance_cap, trust)
        importance = tl.where(seen, trust, 0.0)
    if IS_CISPO:
        grad_ratio = tl.zeros((BLOCK,), tl.float32)
        grad_logprob = -weight * importance * by_logprob
    else:
        grad_logprob = tl.zeros((BLOCK,), tl.float32)
        held = clipped | (x > MAX_EXPONENT)
        grad_ratio = tl.where(held, 0.0, -weight * importance * (ratio * advantage))
    total = -importance * surrogate
    kl = tl.zeros((BLOCK,), tl.float32)
    if HAS_REF:
        kl, slope = _kl(tl.where(seen, ref - logprob, 0.0), ESTIMATOR)
        total += kl_beta * kl
        by_kl = weight * kl_beta * slope  # 0 where the weight is
        if IS_CISPO:
            grad_logprob += by_kl
        else:
            grad_logprob = by_kl
    tl.store(loss + block, tl.sum(weight * total, 0))
    # One row at a time: 5 * num_tokens may not fit in 32 bits.
    out = outputs + token
    tl.store(out, grad_ratio, mask=inside)
    out += num_tokens
    tl.store(out, grad_logprob, mask=inside)
    out += num_tokens
    tl.store(out, tl.where(seen, ratio, 0.0), mask=inside)
    out += num_tokens
    tl.store(out, tl.where(clipped, 1.0, 0.0), mask=inside)
    out += num_tokens
    tl.store(out, kl, mask=inside)
    out += num_tokens
    tl.store(out, importance, mask=inside)


def policy_terms(tokens: TokenTensors, settings: PolicySettings) -> PolicyTerms:
    """Compute loss, derivatives and metrics of (T,) tokens; T may be 0."""
    given = TokenTensors._make(t if t is None else t.contiguous() for t in tokens)
    logprobs, old_logprobs = given.both_logprobs()
    count = len(logprobs)
    blocks = triton.cdiv(count, BLOCK)
    device = logprobs.device
    loss = torch.empty(blocks, dtype=torch.float32, device=device)
    outputs = torch.empty(6, count, dtype=torch.float32, device=device)
    if count:
        with torch.cuda.device_of(logprobs):
            policy_terms_kernel[(blocks,)](
                logprobs,
                old_logprobs,
                _or(given.ref_logprobs, logprobs),
                _or(given.rollout_logprobs, logprobs),
                given.advantages,
                given.weights,
                _or(given.log_ratio, logprobs),
                loss,
                outputs,
                count,
                settings.clip_low,
                settings.clip_high,
                settings.dual_clip or 0.0,
                settings.kl_beta,
                float("inf") if settings.importance_cap is None else settings.importance_cap,
                ESTIMATOR=1 + KL_ESTIMATORS.index(settings.kl_estimator),
                HAS_REF=given.ref_logprobs is not None,
                HAS_ROLLOUT=given.rollout_logprobs is not None,
                HAS_LOG_RATIO=given.log_ratio is not None,
                HAS_DUAL_CLIP=settings.dual_clip is not None,
                IS_CISPO=settings.objective == "cispo",
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return PolicyTerms(loss, *outputs.unbind())


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a valid pointer for an argument that the kernel does not read."""
    return stand_in if tensor is None else tensor
