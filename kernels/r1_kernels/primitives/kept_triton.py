"""Softmax statistics of the tokens that a sampler kept, and their gradient.

Formulae: `rows_triton`, with the sums over the kept ids alone. One program computes one row, for
the reason given in `softmax_triton`. Per kept id, kept_statistics reads the id and its logit, 4 + b
bytes; kept_gradient reads the same and writes 4; kept_scatter reads 8 and writes the whole row, 2
or 4 bytes per logit, once. A gathered logit moves 32 bytes of memory, but a row keeps a few dozen
ids, and its other logits are not read.

The gradient takes two kernels, because it may be written over the logits: a row's zeros must come
after every program's last read of it, and the launch between them is that order. With a vocabulary
spread over ranks, an all-gather of the statistics falls between the first kernel and the second
(`r1_kernels.vocabulary`); ids of other ranks' columns are read and left out.

A row may keep none of a shard's ids: peak -inf and sums 0, which add nothing to the other ranks'.
A target that is a column of this shard and was not kept makes its statistics NaN, which shows in
the loss."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1_kernels.primitives.rows_triton import (
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
from r1_kernels.sampling_mask import KeptIds
from r1_kernels.vocabulary import STATISTICS, RowUpstream, VocabShard

# By registers, untimed (`primitives`; `python tools/bench resources --alternatives --only
# kept_statistics`, and so on). Registers are those of bf16 / fp32; instructions per id those of
# sm_90. No alternative uses shared memory, and registers limit the programs per SM in none: with
# one or two warps an SM holds 32, its limit.
#     kept_statistics                 sm_80     sm_90    sm_100   instructions per id
#     LOADS 2                       31 / 32   31 / 34   32 / 34   32.5 / 30.5
#     LOADS 4                       38 / 38   36 / 38   42 / 38   29.3 / 27.8    used
#     LOADS 8                       44 / 40   44 / 44   46 / 44   28.0 / 26.8
# A row keeps a few dozen ids, so a program is one warp. Its turn is LOADS x 32 ids: of the
# 256 with 8 loads most would be masked.
LANES = 32
LOADS = 4
#     kept_gradient                   sm_80     sm_90    sm_100   instructions per id, fp32
#     GRADIENT_IDS 32               28 / 30   28 / 30   30 / 30   25.8
#     GRADIENT_IDS 64               30 / 29   27 / 29   30 / 29   23.5    used
#     GRADIENT_IDS 128              35 / 42   35 / 33   33 / 33   22.0
# Ids per turn of one warp: 64 are two loads in flight per thread.
GRADIENT_IDS = 64
# kept_scatter, columns per turn of the zeros / ids per turn / warps; the instructions are those of
# the loop over ids.
#     2048 / 128 / 4                24 / 26   24 / 28   24 / 28   17.3 / 15.5
#     4096 / 128 / 2                28 / 32   28 / 32   28 / 32   14.8 / 13.4
#     4096 /  64 / 4                26 / 30   26 / 30   26 / 30   17.5 / 15.8
#     4096 / 128 / 4                24 / 28   24 / 28   24 / 28   17.3 / 15.5    used
#     4096 / 128 / 8                26 / 30   26 / 30   26 / 30   17.5 / 15.8
#     8192 / 128 / 4                24 / 28   24 / 32   24 / 32   17.3 / 15.5
# The zeros are nearly all of its traffic, and these figures do not show them: nothing measured
# here decides between the blocks of columns. An SM holds 64 warps in each; two per program take
# fewer instructions per id.
SCATTER_BLOCK = 4096
SCATTER_IDS = 128
SCATTER_WARPS = 4


@triton.jit
def _kept_range(starts, ends, row):
    """Return where a row's kept ids begin, and how many there are."""
    start = tl.load(starts + row)
    return start, (tl.load(ends + row) - start).to(tl.int32)


@triton.jit
def _kept_columns(token_ids, start, count, place, first_column, num_real_columns):
    """Return columns of the ids at start + place, and which of them are this shard's."""
    in_bounds = place < count
    column = tl.load(token_ids + start + place, mask=in_bounds, other=0) - first_column
    return column, in_bounds & (column >= 0) & (column < num_real_columns)


@triton.jit
def _kept_logits(token_ids, row_pointer, start, count, place, first_column, num_real_columns):
    """Return what `_kept_columns` does, and the columns' logits, -inf where they are not here."""
    column, in_shard = _kept_columns(token_ids, start, count, place, first_column, num_real_columns)
    z = tl.load(row_pointer + column, mask=in_shard, other=float("-inf")).to(tl.float32)
    return column, in_shard, z


@triton.jit
def kept_statistics_kernel(
    logits,  # in: (T, V_local) any float, rows `row_stride` elements apart
    targets,  # in: (T,) integers, ids of the whole vocabulary
    token_ids,  # in: (N,) int32, ids of the whole vocabulary
    starts,  # in: (T,) int64, of each row in token_ids
    ends,  # in: (T,) int64
    statistics,  # out: (4, T) fp32, `vocabulary.STATISTICS`
    row_stride,
    num_rows,  # T
    first_column,  # id of the shard's first column
    num_real_columns,  # columns before the padding
    scale,  # c
    LANES: tl.constexpr,  # threads of the program
    LOADS: tl.constexpr,  # ids in flight per thread
):
    """Compute the statistics of one row's kept tokens; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits + row * row_stride
    local, target_in_shard = target_column(targets, row, first_column, num_real_columns)
    start, count = _kept_range(starts, ends, row)
    lane = tl.arange(0, LANES)
    to_base2 = scale * LOG2E
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)  # in base 2
    target_logit = tl.zeros((LANES,), tl.float32)
    hits = tl.zeros((LANES,), tl.int32)
    for turn in range(0, count, LOADS * LANES):
        loaded = ()  # a tuple that grows in the loop, which Triton unrolls
        for i in tl.static_range(LOADS):
            place = turn + i * LANES + lane
            column, in_shard, z = _kept_logits(
                token_ids, row_pointer, start, count, place, first_column, num_real_columns
            )
            is_target = in_shard & (column == local)
            target_logit = tl.where(is_target, z, target_logit)
            hits = tl.where(is_target, 1, hits)
            loaded = loaded + (z[:, None],)  # type: ignore[assignment]  # see above
        peak, total, moment = fold_logits(loaded, peak, total, moment, to_base2)
    row_peak, row_total, row_moment = combine_lanes(peak, total, moment, to_base2)
    row_target_logit = tl.sum(target_logit, 0)
    lost = target_in_shard & (tl.sum(hits, 0) == 0)
    row_target_logit = tl.where(lost, float("nan"), row_target_logit)
    store_statistics(statistics, row, num_rows, row_peak, row_total, row_moment, row_target_logit)


@triton.jit
def kept_gradient_kernel(
    # Tensors: what `kept_statistics_kernel` read, `RowUpstream`, and the result.
    logits,  # in: (T, V_local) any float, rows `row_stride` elements apart
    targets,  # in: (T,) integers, ids of the whole vocabulary
    token_ids,  # in: (N,) int32
    starts,  # in: (T,) int64
    ends,  # in: (T,) int64
    peak,  # in: (T,) fp32, m over the kept tokens of all ranks
    log_total,  # in: (T,) fp32, log S
    entropy,  # in: (T,) fp32, read only with HAS_ENTROPY
    grad_logprobs,  # in: (T,) fp32, g
    grad_entropy,  # in: (T,) fp32, h, read only with HAS_ENTROPY
    values,  # out: (N,) fp32, of the ids in this shard
    # Numbers: of the logits, of the `VocabShard`, and of the temperature.
    row_stride,
    first_column,
    num_real_columns,
    scale,  # c
    # Constants of the compiled kernel.
    HAS_ENTROPY: tl.constexpr,
    IDS: tl.constexpr,  # per turn
):
    """Write the gradient of one row's kept logits; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits + row * row_stride
    local, _ = target_column(targets, row, first_column, num_real_columns)
    start, count = _kept_range(starts, ends, row)
    to_base2 = scale * LOG2E
    row_peak, log2_total, upstream, flat, slope, has_gradient = load_row_upstream(
        row, peak, log_total, entropy, grad_logprobs, grad_entropy, scale, HAS_ENTROPY
    )
    for turn in range(0, count, IDS):
        place = turn + tl.arange(0, IDS)
        column, in_shard, z = _kept_logits(
            token_ids, row_pointer, start, count, place, first_column, num_real_columns
        )
        d = softmax_gradient(z, row_peak, to_base2, log2_total, flat, slope, HAS_ENTROPY)
        d = tl.where(column == local, d + upstream, d)
        # A row without upstream gradients may hold anything, NaN included.
        d = tl.where(has_gradient, d, 0.0)
        tl.store(values + start + place, d, mask=in_shard)


@triton.jit
def kept_scatter_kernel(
    values,  # in: (N,) any float
    token_ids,  # in: (N,) int32
    starts,  # in: (T,) int64
    ends,  # in: (T,) int64
    out,  # out: (T, V_local) any float, rows `row_stride` elements apart
    row_stride,
    first_column,
    num_columns,  # V_local, padding included
    num_real_columns,
    BLOCK: tl.constexpr,  # columns per turn of the zeros
    IDS: tl.constexpr,  # ids per turn
    ALIGNMENT: tl.constexpr,  # of rows, in elements
):
    """Write one row: its values at the kept ids, 0 elsewhere; grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = out + tl.multiple_of(row * row_stride, ALIGNMENT)
    dtype = out.dtype.element_ty
    start, count = _kept_range(starts, ends, row)
    columns = tl.arange(0, BLOCK)
    unmasked_end = num_columns // BLOCK * BLOCK
    for turn in range(0, unmasked_end, BLOCK):
        tl.store(row_pointer + (turn + columns), tl.zeros((BLOCK,), dtype))
    if unmasked_end < num_columns:
        column = unmasked_end + columns
        tl.store(row_pointer + column, tl.zeros((BLOCK,), dtype), mask=column < num_columns)
    tl.debug_barrier()  # the zeros of other threads come first
    for turn in range(0, count, IDS):
        place = turn + tl.arange(0, IDS)
        column, in_shard = _kept_columns(
            token_ids, start, count, place, first_column, num_real_columns
        )
        value = tl.load(values + start + place, mask=in_shard, other=0.0)
        tl.store(row_pointer + column, value.to(dtype), mask=in_shard)


def kept_statistics(
    logits: Tensor, targets: Tensor, shard: VocabShard, scale: float, kept_ids: KeptIds
) -> Tensor:
    """Compute this shard's part of each row's softmax over its kept tokens.

    Args:
        logits: (T, V_local), columns adjacent in memory.
        targets: (T,) ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        kept_ids: the kept ids of the T rows.

    Returns:
        (4, T) fp32, `vocabulary.STATISTICS`; the logit of a target that was not kept is NaN."""
    check_rows(logits, targets, shard)
    rows = len(logits)
    out = torch.empty(len(STATISTICS), rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            kept_statistics_kernel[(rows,)](
                logits,
                targets.contiguous(),
                *_contiguous_ids(kept_ids),
                out,
                logits.stride(0),
                rows,
                shard.first_column,
                shard.num_real,
                scale,
                LANES=LANES,
                LOADS=LOADS,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return out


def kept_gradient(
    logits: Tensor,
    targets: Tensor,
    shard: VocabShard,
    scale: float,
    upstream: RowUpstream,
    kept_ids: KeptIds,
) -> Tensor:
    """Compute the gradient of the logits of the kept tokens.

    Rows whose two upstream gradients are 0 get 0.

    Args:
        logits: (T, V_local), columns adjacent in memory.
        targets: (T,) ids of the whole vocabulary.
        shard: the part of the vocabulary that the columns are.
        scale: 1 / temperature.
        upstream: parts of the softmax and the upstream gradients, each (T,).
        kept_ids: the kept ids of the T rows.

    Returns:
        (N,) fp32, one for each of `kept_ids.token_ids` that is in these rows and in this shard; the
        others are not defined."""
    check_rows(logits, targets, shard)
    values = torch.empty(len(kept_ids.token_ids), dtype=torch.float32, device=logits.device)
    if len(logits):
        with torch.cuda.device_of(logits):
            kept_gradient_kernel[(len(logits),)](
                logits,
                targets.contiguous(),
                *_contiguous_ids(kept_ids),
                *upstream_arguments(upstream),
                values,
                logits.stride(0),
                shard.first_column,
                shard.num_real,
                scale,
                HAS_ENTROPY=upstream.grad_entropy is not None,
                IDS=GRADIENT_IDS,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return values


def kept_scatter(values: Tensor, shard: VocabShard, kept_ids: KeptIds, out: Tensor) -> Tensor:
    """Write the kept tokens' values, and 0 to all other columns, to `out`; return `out`.

    Args:
        values: (N,), one for each of `kept_ids.token_ids`; those outside these rows or this shard
            are not read.
        shard: the part of the vocabulary that the columns are.
        kept_ids: the kept ids of the T rows.
        out: (T, V_local), columns adjacent in memory."""
    rows, columns = out.shape
    if rows:
        block = min(SCATTER_BLOCK, max(16, triton.next_power_of_2(columns)))
        with torch.cuda.device_of(out):
            kept_scatter_kernel[(rows,)](
                values.contiguous(),
                *_contiguous_ids(kept_ids),
                out,
                out.stride(0),
                shard.first_column,
                columns,
                shard.num_real,
                BLOCK=block,
                IDS=SCATTER_IDS,
                ALIGNMENT=row_alignment(out),
                num_warps=max(1, min(SCATTER_WARPS, block // 256)),
            )
    return out


def _contiguous_ids(kept_ids: KeptIds) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three tensors of the kept ids, each with adjacent elements."""
    return kept_ids.token_ids.contiguous(), kept_ids.starts.contiguous(), kept_ids.ends.contiguous()
