"""Softmax statistics of rows of logits, and the gradient of the logits: one pass over memory each.

Formulae: `rows_triton`.

Two kernels, because the gradient needs the whole row's sums: with a vocabulary spread over ranks,
an all-gather of the 16 bytes per row that the first writes falls between them (not here, in
`r1_kernels.vocabulary`). row_statistics reads each logit once, b bytes; logits_gradient reads it
once more and writes its gradient, 2 or 4 bytes. Autograd around both: `r1_kernels.token_logprobs`,
`r1_kernels.linear_head`.

One program computes one row; rows of 129,280 columns keep a GPU busy from a few hundred tokens on.
With several programs per row, a row's sums would depend on the number of rows: old and new
log-probabilities of one token, computed in batches of different sizes, would differ in their bits.

In the forward pass every *lane* - the columns that one thread loads - keeps its own running maximum
and sums, so that the loop has no barrier and no shuffle, and one exponential per element; lanes are
combined once, at the end of the row. In the backward pass the target's column is computed
separately and stored last. Whole iterations come first, without a mask: a mask whose end is no
multiple of 16 would split the 16-byte loads. Rows that do not all begin at a multiple of 16 bytes
are read in smaller pieces."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1_kernels.primitives.rows_triton import (
    LOAD_BYTES,
    LOG2E,
    check_rows,
    combine_lanes,
    fold_logits,
    load_row_upstream,
    row_alignment,
    softmax_gradient,
    store_statistics,
    target_column,
    upstream_arguments,
)
from r1_kernels.vocabulary import STATISTICS, RowUpstream, VocabShard

# By registers, untimed (`primitives`). By Triton 3.7.1 (requirements/cuda.lock) `row_statistics` of
# bf16 has 48 registers instead of 64 with as many instructions, and nothing spills. What is used
# took, both passes together, 64 ms on an H200 by Triton 3.6.0, where memory needs 14.5
# (docs/benchmarks/gpu-h200.md, one round). NARROW_LOADS decides with `--vocab 129281`.

# Loads in flight per lane, whose elements share one update of its maximum. For bf16 on sm_90, 2, 4
# and 8 loads take 10.2, 9.5 and 9.1 instructions per element, where memory takes as long as 12.4,
# and 32, 64 and 128 registers: 64 KiB in flight per SM each, from 64, 32 and 16 warps. 16 warps
# would leave a scheduler only four to hide each other's latency.
LOADS = 4
# Loads in flight per lane, of one element each, in rows that do not begin at a multiple of 16
# bytes. 4, 8 and 16 loads of bf16: 28, 32 and 39 registers, 14.8, 12.4 and 11.0 instructions, 16,
# 32 and 48 KiB in flight per SM.
NARROW_LOADS = 8
# One lane per thread. 128, 256 and 512 lanes for a whole bf16 row: 48, 64 and 64 registers, 9.4,
# 9.5 and 9.7 instructions, 40, 32 and 32 warps per SM; without a time, nothing decides between 128
# and 256. Short rows get fewer lanes: the end of a row costs half an iteration.
MAX_LANES = 256
MIN_TURNS = 4
# bf16, columns per turn / warps: registers, instructions per element, warps and KiB in flight per
# SM. None spills.
#     2048 / 8: 32, 8.0, 64, 32    4096 / 8: 32, 7.0, 64, 64 (used)    8192 / 8: 40, 6.8, 48, 96
#     4096 / 4: 32, 6.8, 64, 128; on sm_100 5.4 instead of 5.0         4096 / 16: 32, 8.0, 64, 32
GRADIENT_BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def row_statistics_kernel(
    logits,  # in: (T, V_local) any float, rows `row_stride` elements apart
    targets,  # in: (T,) integers, ids of the whole vocabulary
    statistics,  # out: (4, T) fp32, `vocabulary.STATISTICS`
    row_stride,
    num_rows,  # T
    first_column,  # id of the shard's first column
    num_real_columns,  # columns before the padding
    scale,  # c
    LANES: tl.constexpr,  # threads of the program
    VECTOR: tl.constexpr,  # adjacent elements per load
    LOADS: tl.constexpr,
):
    """Compute the statistics of one row; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits + tl.multiple_of(row * row_stride, VECTOR)
    # Loaded now, used at the end: hides the latency of two dependent loads.
    local, in_shard = target_column(targets, row, first_column, num_real_columns)
    target_logit = tl.load(row_pointer + local, mask=in_shard, other=0.0).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    to_base2 = scale * LOG2E
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)  # in base 2
    LOAD: tl.constexpr = LANES * VECTOR
    unmasked_end = num_real_columns // (LOADS * LOAD) * (LOADS * LOAD)
    for start in range(0, unmasked_end, LOADS * LOAD):
        loaded = ()  # a tuple that grows in the loop, which Triton unrolls
        for i in tl.static_range(LOADS):
            z = tl.load(row_pointer + (start + i * LOAD + columns))
            loaded = loaded + (z.to(tl.float32),)  # type: ignore[assignment]  # see above
        peak, total, moment = fold_logits(loaded, peak, total, moment, to_base2)
    if unmasked_end < num_real_columns:
        rest = ()
        for i in tl.static_range(LOADS):
            column = unmasked_end + i * LOAD + columns
            z = tl.load(row_pointer + column, mask=column < num_real_columns, other=float("-inf"))
            rest = rest + (z.to(tl.float32),)  # type: ignore[assignment]  # see above
        peak, total, moment = fold_logits(rest, peak, total, moment, to_base2)
    row_peak, row_total, row_moment = combine_lanes(peak, total, moment, to_base2)
    store_statistics(statistics, row, num_rows, row_peak, row_total, row_moment, target_logit)


@triton.jit
def logits_gradient_kernel(
    # Tensors: what `row_statistics_kernel` read, `RowUpstream`, and the result.
    logits,  # in: (T, V_local) any float, rows `row_stride` elements apart
    targets,  # in: (T,) integers, ids of the whole vocabulary
    peak,  # in: (T,) fp32, m over the whole vocabulary
    log_total,  # in: (T,) fp32, log S
    entropy,  # in: (T,) fp32, read only with HAS_ENTROPY
    grad_logprobs,  # in: (T,) fp32, g
    grad_entropy,  # in: (T,) fp32, h, read only with HAS_ENTROPY
    gradient,  # out: (T, V_local) any float; may be `logits` itself
    # Numbers: of the two matrices, of the `VocabShard`, and of the temperature.
    row_stride,
    gradient_stride,
    first_column,  # id of the shard's first column
    num_columns,  # V_local; those from `num_real_columns` on are padding and get 0
    num_real_columns,
    scale,  # c
    # Constants of the compiled kernel.
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,  # columns per turn
    ALIGNMENT: tl.constexpr,  # of rows, in elements
):
    """Write the gradient of one row; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits + tl.multiple_of(row * row_stride, ALIGNMENT)
    out = gradient + tl.multiple_of(row * gradient_stride, ALIGNMENT)
    dtype = gradient.dtype.element_ty
    to_base2 = scale * LOG2E
    row_peak, log2_total, upstream, flat, slope, has_gradient = load_row_upstream(
        row, peak, log_total, entropy, grad_logprobs, grad_entropy, scale, HAS_ENTROPY
    )
    # A row without upstream gradients may hold anything, NaN included, and is not read.
    last = tl.where(has_gradient, num_real_columns, 0)
    local, in_shard = target_column(targets, row, first_column, last)
    target_logit = tl.load(row_pointer + local, mask=in_shard, other=0.0).to(tl.float32)
    target_logit = upstream + softmax_gradient(
        target_logit, row_peak, to_base2, log2_total, flat, slope, HAS_ENTROPY
    )
    tl.debug_barrier()  # `out` may be `logits`: every thread has read the target's logit
    columns = tl.arange(0, BLOCK)
    unmasked_end = last // BLOCK * BLOCK
    for start in range(0, unmasked_end, BLOCK):
        column = start + columns
        z = tl.load(row_pointer + column).to(tl.float32)
        d = softmax_gradient(z, row_peak, to_base2, log2_total, flat, slope, HAS_ENTROPY)
        tl.store(out + column, d.to(dtype))
    for start in range(unmasked_end, num_columns, BLOCK):
        column = start + columns
        z = tl.load(row_pointer + column, mask=column < last, other=float("-inf")).to(tl.float32)
        d = softmax_gradient(z, row_peak, to_base2, log2_total, flat, slope, HAS_ENTROPY)
        d = tl.where(column < last, d, 0.0)
        tl.store(out + column, d.to(dtype), mask=column < num_columns)
    tl.debug_barrier()  # the target's column, stored by some thread above, is overwritten
    tl.store(out + local, target_logit.to(dtype), mask=in_shard)


def row_statistics(logits: Tensor, targets: Tensor, shard: VocabShard, scale: float) -> Tensor:
    """Compute this shard's part of each row's softmax.

    Args:
        logits: (T, V_local), columns adjacent in memory.
        targets: (T,) ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.

    Returns:
        (4, T) fp32, `vocabulary.STATISTICS`."""
    check_rows(logits, targets, shard)
    rows = len(logits)
    out = torch.empty(len(STATISTICS), rows, dtype=torch.float32, device=logits.device)
    if rows:
        vector = min(LOAD_BYTES // logits.element_size(), row_alignment(logits))
        loads = LOADS if vector > 1 else NARROW_LOADS
        lanes = triton.next_power_of_2(triton.cdiv(shard.num_real, MIN_TURNS * loads * vector))
        lanes = min(MAX_LANES, max(32, lanes))
        with torch.cuda.device_of(logits):
            row_statistics_kernel[(rows,)](
                logits,
                targets.contiguous(),
                out,
                logits.stride(0),
                rows,
                shard.first_column,
                shard.num_real,
                scale,
                LANES=lanes,
                VECTOR=vector,
                LOADS=loads,
                num_warps=lanes // 32,
                enable_fp_fusion=True,
            )
    return out


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    scale: float,
    upstream: RowUpstream,
    out: Tensor,
) -> Tensor:
    """Write the gradient of the logits to `out`, in its dtype; return `out`.

    Padding columns get 0, and so do rows whose two upstream gradients are 0.

    Args:
        logits: (T, V_local), columns adjacent in memory.
        targets: (T,) ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        upstream: parts of the softmax and the upstream gradients, each (T,).
        out: (T, V_local); it may be `logits` itself."""
    check_rows(logits, targets, shard)
    check_rows(out, targets, shard)
    rows, columns = logits.shape
    if rows:
        block = min(GRADIENT_BLOCK, max(16, triton.next_power_of_2(columns)))
        with torch.cuda.device_of(logits):
            logits_gradient_kernel[(rows,)](
                logits,
                targets.contiguous(),
                *upstream_arguments(upstream),
                out,
                logits.stride(0),
                out.stride(0),
                shard.first_column,
                columns,
                shard.num_real,
                scale,
                HAS_ENTROPY=upstream.grad_entropy is not None,
                BLOCK=block,
                ALIGNMENT=min(row_alignment(logits), row_alignment(out)),
                num_warps=max(1, min(NUM_WARPS, block // 256)),
                enable_fp_fusion=True,
            )
    return out
