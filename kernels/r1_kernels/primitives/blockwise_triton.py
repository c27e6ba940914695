"""FP8 e4m3 block-wise quantization in Triton: every element is read once and written once.

    scale_inv = max(max |x|, 1e-4) / 448     q = e4m3(x · (1 / scale_inv))     x' = q · scale_inv

per block (`r1_kernels.blockwise`): 448 is e4m3's largest number; 1e-4 avoids 1 / 0 in a block of
zeros.

One kernel per direction and no collective: a block's scale depends on that block alone. One program
holds one tile of rows x 128 elements in registers: load, largest magnitude, scale, convert, store.
A weight's tile is its 128x128 block, an activation's is 32 blocks of 1x128. Memory is the lower
bound: 3 bytes per bf16 element in either direction, 1.6e12 elements/s at the 4.8 TB/s of an H200.
There is no backward kernel: quantization has no gradient here (`r1_kernels.blockwise`).

To have the same bits as the plain definition:
- The largest magnitude is the maximum of the bit patterns as integers. Non-negative floats are
  ordered like their bits, and NaN is above infinity; `tl.max` of floats drops NaN.
- Divisions are IEEE's (`div_rn`): `/` multiplies by an approximate reciprocal.
- `enable_fp_fusion=False`: x * (1 / scale_inv) is rounded before anything is added to it.
- Triton converts from and to e4m3 from sm_89 on only. On older devices `_e4m3_code` and
  `_e4m3_value` do, with 17 and 14 instructions per element, mostly integer: about 0.75e12
  elements/s on an A100, whose memory allows 0.68e12. On an H200 they would be slower than memory,
  so newer devices use their own instruction. Both give the same code for all values of a scaled
  block, within ±448 and NaN; beyond, one of them saturates."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = tl.constexpr(128)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_AMAX_BITS = tl.constexpr(0x38D1B717)  # 1e-4 in fp32

# By registers, untimed (`primitives`). Rows / warps per tile: registers (in brackets: sm_80), bf16
# KiB in flight and warps per SM, instructions per element. By Triton 3.7.1 (requirements/cuda.lock)
# what is used takes at most one register more.
#   weight      128 / 8: 89 (sm_80: 128), 64, 16, 9.5     128 / 16: 53 (64), 64, 32, 12.8 (used)
#               128 / 32: 39 (40), 32, 32, 19.2
#   activation  16 / 4: 39, 48, 48, 20.1                  32 / 4: 59, 64, 32, 14.3 (used)
#               64 / 4: 95, 80, 20, 11.3                  64 / 8: 59, 64, 32, 14.1
#   back        16 / 4: 32, 48, 64, 10.1                  32 / 4: 40, 72, 48, 7.8 (used)
#               64 / 4: 56, 108, 36, 6.8                  64 / 8: 40, 72, 48, 7.8
# Fewer warps per weight tile take fewer instructions, but leave half the warps to hide them.
QUANTIZE = {
    128: {"TILE_ROWS": 128, "num_warps": 16, "enable_fp_fusion": False},
    1: {"TILE_ROWS": 32, "num_warps": 4, "enable_fp_fusion": False},
}
DEQUANTIZE = {"TILE_ROWS": 32, "num_warps": 4, "enable_fp_fusion": False}
STORE_BYTES = 16  # the largest store of one thread


@triton.jit
def _e4m3_code(y):
    """Return the e4m3 code of each fp32 |y| < 464 or NaN, rounded to nearest even; uint8.

    Added to 2^20 times its own power of two (at least e4m3's smallest, 2^-6), y is rounded by the
    addition to a multiple of 2^-3 of that power, which is e4m3's spacing, subnormals included. The
    sum's low bits then count those multiples, and a count that reaches the next power of two
    carries into the exponent of the code by itself."""
    bits = y.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, 121 << 23)  # fp32's exponent field of 2^-6 is 121
    anchor = power + (20 << 23)
    total = (tl.abs(y) + anchor.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    code = total - anchor + (power >> 20) - (121 << 3)
    code = tl.where(y == y, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _e4m3_value(code):
    """Return the exact fp32 value of each uint8 e4m3 code.

    Seven bits shifted left by seven are the fp16 number 2^-8 times as large, subnormals included:
    fp16 has the same layout with eight more in the exponent's bias."""
    code = code.to(tl.int16)
    half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _program_tile(rows, columns, TILE_ROWS: tl.constexpr, RUN: tl.constexpr):
    """Return this program's tile: its rows, columns, mask, column of blocks and their number.

    Rows are int64, so that all offsets are. A thread holds at most RUN adjacent elements of a
    row."""
    pid = tl.program_id(0)
    across = tl.cdiv(columns, WIDTH)
    block_column = pid % across
    row = (pid // across).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.max_contiguous(block_column * WIDTH + tl.arange(0, WIDTH), RUN)
    in_bounds = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, in_bounds, block_column, across


@triton.jit(do_not_specialize=["rows"])  # the number of tokens changes with every batch
def _quantize_kernel(
    x,  # in: (rows, columns) fp32, bf16 or fp16, its rows x_stride elements apart
    q,  # out: (rows, columns) uint8, contiguous: e4m3 codes
    scale_inv,  # out: (ceil(rows / BLOCK_ROWS), ceil(columns / 128)) fp32, contiguous
    rows,
    columns,
    x_stride,
    BLOCK_ROWS: tl.constexpr,  # 1, or TILE_ROWS
    TILE_ROWS: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,  # the device converts to e4m3 itself
):
    """Quantize one tile of TILE_ROWS x 128; grid (tiles,), neighbors in one row of blocks."""
    row, column, in_bounds, block_column, across = _program_tile(rows, columns, TILE_ROWS, WIDTH)
    address = row[:, None] * x_stride + column[None, :]
    values = tl.load(x + address, mask=in_bounds, other=0.0).to(tl.float32)
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    if BLOCK_ROWS > 1:
        amax = tl.max(amax, axis=0)
    amax = tl.maximum(amax, SMALLEST_AMAX_BITS).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, E4M3_MAX)
    inverse = tl.div_rn(1.0, scale)
    if BLOCK_ROWS > 1:
        tl.store(scale_inv + tl.program_id(0), scale)
    else:
        tl.store(scale_inv + row * across + block_column, scale, mask=row < rows)
        inverse = inverse[:, None]
    scaled = values * inverse
    if HARDWARE_CAST:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = _e4m3_code(scaled)
    tl.store(q + row[:, None] * columns + column[None, :], codes, mask=in_bounds)


@triton.jit(do_not_specialize=["rows"])
def _dequantize_kernel(
    q,  # in: (rows, columns) uint8, its rows q_stride elements apart: e4m3 codes
    scale_inv,  # in: (ceil(rows / BLOCK_ROWS), ceil(columns / 128)) fp32, contiguous
    out,  # out: (rows, columns) fp32, bf16 or fp16, contiguous
    rows,
    columns,
    q_stride,
    BLOCK_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RUN: tl.constexpr,  # adjacent elements per thread
    HARDWARE_CAST: tl.constexpr,
):
    """Restore one tile of TILE_ROWS x 128; grid as of `_quantize_kernel`."""
    row, column, in_bounds, block_column, across = _program_tile(rows, columns, TILE_ROWS, RUN)
    codes = tl.load(q + row[:, None] * q_stride + column[None, :], mask=in_bounds, other=0)
    block = row // BLOCK_ROWS * across + block_column
    scale = tl.load(scale_inv + block, mask=row < rows, other=0.0)
    if HARDWARE_CAST:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        values = _e4m3_value(codes)
    values *= scale[:, None]
    address = row[:, None] * columns + column[None, :]
    tl.store(out + address, values.to(out.dtype.element_ty), mask=in_bounds)


def quantize_blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return q (M, N) float8_e4m3fn and scale_inv (ceil(M / rows), ceil(N / 128)) fp32 of x.

    x is (M, N) fp32, bf16 or fp16; `block` is (rows, 128), rows 1 or 128."""
    assert x.dim() == 2 and block in ((128, 128), (1, 128)), (x.shape, block)
    x = _with_adjacent_columns(x)
    rows, columns = x.shape
    q = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scale_inv = torch.empty(
        (triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1])),
        dtype=torch.float32,
        device=x.device,
    )
    _launch_tiles(
        _quantize_kernel,
        (x, q.view(torch.uint8), scale_inv, rows, columns, x.stride(0)),
        BLOCK_ROWS=block[0],
        HARDWARE_CAST=_has_e4m3(x.device),
        **QUANTIZE[block[0]],
    )
    return q, scale_inv


def dequantize_blocks(
    q: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return each value times the scale of its block.

    Args:
        q: (M, N) float8_e4m3fn.
        scale_inv: the blocks' scales, fp32.
        block: the rows and columns of a block.
        dtype: the dtype of the result.

    Returns:
        (M, N) of `dtype`."""
    blocks = tuple(triton.cdiv(size, along) for size, along in zip(q.shape, block, strict=True))
    assert scale_inv.shape == blocks, (scale_inv.shape, q.shape, block)
    assert scale_inv.dtype == torch.float32, scale_inv.dtype
    codes = _with_adjacent_columns(q.view(torch.uint8))
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    # Without the limit a thread would load 16 codes and, through shared memory and spilled
    # registers (sm_80), pass half of what it computed to another thread's 16-byte stores.
    _launch_tiles(
        _dequantize_kernel,
        (codes, scale_inv.contiguous(), out, *q.shape, codes.stride(0)),
        BLOCK_ROWS=block[0],
        RUN=STORE_BYTES // dtype.itemsize,
        HARDWARE_CAST=_has_e4m3(q.device),
        **DEQUANTIZE,
    )
    return out


def _launch_tiles(kernel, arguments: tuple[Any, ...], *, TILE_ROWS: int, **settings) -> None:
    """Launch one program per tile.

    Args:
        kernel: the compiled function.
        arguments: three tensors, rows, columns and stride.
        TILE_ROWS: rows of a tile.
        **settings: the kernel's other constants."""
    tensor, _, _, rows, columns, _ = arguments
    programs = triton.cdiv(rows, TILE_ROWS) * triton.cdiv(columns, WIDTH.value)
    if programs:
        with torch.cuda.device_of(tensor):
            kernel[(programs,)](*arguments, TILE_ROWS=TILE_ROWS, **settings)


def _with_adjacent_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _has_e4m3(device: torch.device) -> bool:
    """Whether Triton converts e4m3 on this device: NVIDIA GPUs from sm_89 on."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)
