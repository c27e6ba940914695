"""The policy loss of a flat run of tokens with its derivative, and sums over packed sequences.

Two kernels, because their grids differ: `policy_terms_kernel` has one program per BLOCK tokens,
`segment_sums_kernel` one per sequence. Each reads its inputs once. policy_terms moves, per token in
fp32, 16 bytes (log-probability, old one, advantage, weight), 4 more for each of the reference's and
the engine's log-probabilities and the sequence's log-ratio, and writes 24 (`PolicyTerms` without
the loss); segment_sums reads 4 bytes per token and writes 4 per sequence. There is no backward
kernel: the derivative is known in the forward pass, and autograd multiplies it by one number
(`r1_kernels.policy_loss`).

No collective falls in either kernel. `r1_kernels.averaging` sums over ranks what segment_sums
returns, where the tokens of a sequence are spread over a group.

Each program sums its own part of the loss, in one order, and the caller adds the parts: atomics
would add them in an order, and so with bits, that change from run to run.
Formulae: `r1_kernels.policy_terms`."""

from typing import NamedTuple, Self

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

# By registers, untimed (`primitives`), with a reference. By Triton 3.7.1 (requirements/cuda.lock)
# nothing spills either.
#     tokens per program, warps   registers   instructions per token   programs for 65,536 tokens
#                        256, 4          32                     93.0        256   loads of 8 bytes
#                        256, 2          48                     78.5        256
#                        512, 4          48                     78.8        128   used
#                       1024, 4          92                     73.1         64
#                       1024, 8          48                     79.0         64
# 4 floats per thread are one 16-byte load of each input, and 128 programs about one per SM. At most
# 3.4 MB are moved, so the time is that of one program; with 64 programs half the SMs would idle.
# Nothing in the code decides between 256 / 2 and 512 / 4: the same threads in other programs.
# The series of k3 near 0 came later: 18 instructions per token and 5 registers more in each.
TOKENS_PER_BLOCK = 512
NUM_WARPS = 4
# 8 floats per thread in loads of 4 bytes, because a sequence may start at any element; adjacent
# threads load adjacent elements, so that a warp's 128 bytes are still one line of memory.
#     values per turn, warps   registers   instructions per value   KiB in flight per SM
#                    1024, 4          31                      5.6                     64
#                    2048, 8          31                      6.1                     64   used
#                    4096, 8          40                      5.6                     96
# None spills and memory is the limit of each, so nothing measured here decides between them.
SUM_BLOCK = 2048
SUM_WARPS = 8


class _Limits(NamedTuple):
    """The numbers of `PolicySettings`, one argument of the kernel.

    Attributes:
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: the largest ratio of a negative advantage, read only with HAS_DUAL_CLIP.
        kl_beta: the weight of the KL estimate.
        importance_cap: the largest weight of the correction, read only with HAS_ROLLOUT."""

    clip_low: float
    clip_high: float
    dual_clip: float
    kl_beta: float
    importance_cap: float

    @classmethod
    def of(cls, settings: PolicySettings) -> Self:
        # 0.0 where the term is disabled: the kernel does not read it.
        cap, dual_clip = settings.importance_cap or 0.0, settings.dual_clip or 0.0
        return cls(settings.clip_low, settings.clip_high, dual_clip, settings.kl_beta, cap)


_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _load_fp32(tensor, token, in_bounds):
    """Return (BLOCK,) fp32 elements, 0 outside."""
    return tl.load(tensor + token, mask=in_bounds, other=0.0).to(tl.float32)


@triton.jit
def _capped_exp(x):
    """Return e^x, its exponent capped; NaN stays NaN, which `tl.minimum` would drop."""
    return tl.exp(tl.where(x > _MAX_LOG_RATIO, _MAX_LOG_RATIO, x))


@triton.jit
def _clipped_surrogate(
    log_ratio,
    logprob,
    advantage,
    scale,
    limits,
    HAS_DUAL_CLIP: tl.constexpr,
    IS_CISPO: tl.constexpr,
):
    """Return the surrogate, whether a clip is active, and `scale` times its derivatives.

    They are by the log-ratio and, cispo's, by the log-probability itself."""
    ratio = _capped_exp(log_ratio)
    clipped_ratio = tl.where(ratio < 1.0 - limits.clip_low, 1.0 - limits.clip_low, ratio)
    clipped_ratio = tl.where(ratio > 1.0 + limits.clip_high, 1.0 + limits.clip_high, clipped_ratio)
    clipped = clipped_ratio * advantage
    if IS_CISPO:
        is_clipped = clipped_ratio != ratio
        surrogate = clipped * logprob
        d_log_ratio = tl.zeros(log_ratio.shape, tl.float32)
        d_logprob = scale * clipped
    else:
        unclipped = ratio * advantage
        is_clipped = clipped < unclipped
        surrogate = tl.where(is_clipped, clipped, unclipped)
        if HAS_DUAL_CLIP:
            lower_bound = limits.dual_clip * advantage
            is_below = (advantage < 0.0) & (surrogate < lower_bound)
            surrogate = tl.where(is_below, lower_bound, surrogate)
            is_clipped = is_clipped | is_below
        d_log_ratio = tl.where(is_clipped | (log_ratio > _MAX_LOG_RATIO), 0.0, scale * unclipped)
        d_logprob = tl.zeros(log_ratio.shape, tl.float32)
    return surrogate, is_clipped, d_log_ratio, d_logprob


@triton.jit
def _kl_estimate(g, ESTIMATOR: tl.constexpr):
    """Return estimate 1 to 3 of KL at g = ref_logprob - logprob, and its derivative by logprob."""
    if ESTIMATOR == 1:
        kl = -g
        d_kl = tl.full(g.shape, 1.0, tl.float32)
    elif ESTIMATOR == 2:
        kl = 0.5 * g * g
        d_kl = -g
    else:
        capped = tl.where(g > _MAX_LOG_RATIO, _MAX_LOG_RATIO, g)
        e = tl.exp(capped)
        # e^g - g - 1 loses all digits near 0, so its series there: g^2/2 + … + g^8/8!, whose error
        # is below 5e-8 of the sum for |g| < 0.5.
        series = 1.0 + capped * (1 / 7) * (1.0 + capped * (1 / 8))
        series = 1.0 + capped * (1 / 5) * (1.0 + capped * (1 / 6) * series)
        series = 1.0 + capped * (1 / 3) * (1.0 + capped * (1 / 4) * series)
        is_small = tl.abs(capped) < 0.5
        kl = tl.where(is_small, 0.5 * capped * capped * series, e - capped - 1.0)
        d_kl = tl.where(is_small, -(capped + kl), 1.0 - e)
        d_kl = tl.where(g > _MAX_LOG_RATIO, 0.0, d_kl)
    return kl, d_kl


@triton.jit
def _importance_weight(rollout_log_ratio, unmasked, cap, HAS_ROLLOUT: tl.constexpr):
    """Return min(e^rollout_log_ratio, cap), 1 without rollout_logprobs, 0 where masked."""
    importance = tl.where(unmasked, 1.0, 0.0)
    if HAS_ROLLOUT:
        rollout_ratio = _capped_exp(rollout_log_ratio)
        importance = tl.where(unmasked, tl.where(rollout_ratio > cap, cap, rollout_ratio), 0.0)
    return importance


@triton.jit
def _store_rows(outputs, token, num_tokens, in_bounds, rows):
    """Store a tuple of (BLOCK,) rows of a (rows, num_tokens) matrix."""
    out = outputs + token
    for i in tl.static_range(len(rows)):
        tl.store(out, rows[i], mask=in_bounds)
        out += num_tokens  # row by row: 5 * num_tokens may not fit in 32 bits


@triton.jit
def policy_terms_kernel(
    tokens,  # in: `TokenTensors`, (T,) any float each; those with a flag are read only if it is set
    loss,  # out: (blocks,) fp32
    outputs,  # out: (6, T) fp32: grad_log_ratio, grad_logprob, ratio, clipped, kl, importance
    num_tokens,  # T
    limits,  # `_Limits`
    ESTIMATOR: tl.constexpr,  # 1 to 3, for k1 to k3
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_LOG_RATIO: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    IS_CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the terms of BLOCK tokens and their part of the loss; grid (ceil(T / BLOCK),)."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    in_bounds = token < num_tokens
    weight = _load_fp32(tokens.weights, token, in_bounds)
    logprob = _load_fp32(tokens.logprobs, token, in_bounds)
    old = _load_fp32(tokens.old_logprobs, token, in_bounds)
    advantage = _load_fp32(tokens.advantages, token, in_bounds)
    log_ratio = logprob - old
    if HAS_LOG_RATIO:
        log_ratio = _load_fp32(tokens.log_ratio, token, in_bounds)
    rollout_log_ratio = old
    if HAS_ROLLOUT:
        rollout_log_ratio = old - _load_fp32(tokens.rollout_logprobs, token, in_bounds)
    g = _load_fp32(tokens.ref_logprobs, token, in_bounds) - logprob if HAS_REF else logprob
    # Tokens that do not count may hold NaN: replaced before the arithmetic, not after. A weight of
    # NaN counts, so that it shows in the loss.
    unmasked = (weight > 0.0) | (weight != weight)
    weight = tl.where(unmasked, weight, 0.0)
    advantage = tl.where(unmasked, advantage, 0.0)
    log_ratio = tl.where(unmasked, log_ratio, 0.0)
    importance = _importance_weight(rollout_log_ratio, unmasked, limits.importance_cap, HAS_ROLLOUT)
    surrogate, is_clipped, grad_log_ratio, grad_logprob = _clipped_surrogate(
        log_ratio,
        tl.where(unmasked, logprob, 0.0),
        advantage,
        -weight * importance,
        limits,
        HAS_DUAL_CLIP,
        IS_CISPO,
    )
    token_loss = -importance * surrogate
    kl = tl.zeros((BLOCK,), tl.float32)
    if HAS_REF:
        kl, d_kl = _kl_estimate(tl.where(unmasked, g, 0.0), ESTIMATOR)
        token_loss += limits.kl_beta * kl
        grad_kl = weight * limits.kl_beta * d_kl  # 0 where the weight is
        # Not 0 + grad_kl: the compiler may not drop it, because of -0.
        grad_logprob = grad_logprob + grad_kl if IS_CISPO else grad_kl
    tl.store(loss + block, tl.sum(weight * token_loss, 0))
    ratio = tl.where(unmasked, _capped_exp(log_ratio), 0.0)
    clipped = tl.where(is_clipped, 1.0, 0.0)
    rows = (grad_log_ratio, grad_logprob, ratio, clipped, kl, importance)
    _store_rows(outputs, token, num_tokens, in_bounds, rows)


@triton.jit
def segment_sums_kernel(
    values,  # in: (T,) any float
    cu_seqlens,  # in: (S + 1,) integers
    sums,  # out: (S,) fp32
    BLOCK: tl.constexpr,  # tokens per turn
):
    """Sum the values of one sequence in fp32; grid (S,)."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    first = values + start
    running = tl.zeros((BLOCK,), tl.float32)
    length = (end - start).to(tl.int32)
    for offset in range(0, length, BLOCK):
        token = offset + tl.arange(0, BLOCK)
        running += tl.load(first + token, mask=token < length, other=0.0).to(tl.float32)
    tl.store(sums + sequence, tl.sum(running, 0))


def policy_terms(tokens: TokenTensors, settings: PolicySettings) -> PolicyTerms:
    """Compute loss, derivatives and metrics of (T,) tokens of any stride; T may be 0."""
    tensors = TokenTensors._make(t if t is None else t.contiguous() for t in tokens)
    logprobs, _ = tensors.both_logprobs()
    count = len(logprobs)
    shapes = {name: t.shape for name, t in tensors._asdict().items() if t is not None}
    assert set(shapes.values()) == {(count,)}, shapes
    blocks = triton.cdiv(count, TOKENS_PER_BLOCK)
    device = logprobs.device
    loss = torch.empty(blocks, dtype=torch.float32, device=device)
    outputs = torch.empty(6, count, dtype=torch.float32, device=device)
    if count:
        with torch.cuda.device_of(logprobs):
            policy_terms_kernel[(blocks,)](
                _valid_pointers(tensors),
                loss,
                outputs,
                count,
                _Limits.of(settings),
                ESTIMATOR=1 + KL_ESTIMATORS.index(settings.kl_estimator),
                HAS_REF=tensors.ref_logprobs is not None,
                HAS_ROLLOUT=tensors.rollout_logprobs is not None,
                HAS_LOG_RATIO=tensors.log_ratio is not None,
                HAS_DUAL_CLIP=settings.dual_clip is not None,
                IS_CISPO=settings.objective == "cispo",
                BLOCK=TOKENS_PER_BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return PolicyTerms(loss, *outputs.unbind())


def _valid_pointers(tokens: TokenTensors) -> TokenTensors:
    """Return the tensors with a valid pointer for each that the kernel does not read."""
    return TokenTensors._make(tokens.logprobs if t is None else t for t in tokens)


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum (T,) values of S packed sequences with borders (S + 1,) → (S,) fp32."""
    assert values.dim() == cu_seqlens.dim() == 1, (values.shape, cu_seqlens.shape)
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    sums = torch.empty(len(cu_seqlens) - 1, dtype=torch.float32, device=values.device)
    if len(sums):
        with torch.cuda.device_of(values):
            segment_sums_kernel[(len(sums),)](
                values,
                cu_seqlens,
                sums,
                BLOCK=SUM_BLOCK,
                num_warps=SUM_WARPS,
                enable_fp_fusion=True,
            )
    return sums
