"""FP8 e4m3 block-wise quantization in plain PyTorch, a stripe of block rows at a time.

Whole checkpoints are converted with this, so memory is bounded: besides input and output, only a
few fp32 copies of one stripe exist, of at most STRIPE_ELEMENTS (or one row of blocks)."""

from collections.abc import Iterator

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4
STRIPE_ELEMENTS = 1 << 19  # 2 MiB in fp32: costs more than a call's overhead, and fits in a cache


def quantize_blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Compute `blockwise_triton.quantize_blocks`, whose docstring has arguments and result."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    blocks_across = -(-x.shape[1] // block[1])
    scale_inv = x.new_empty((-(-x.shape[0] // block[0]), blocks_across), dtype=torch.float32)
    # Not a Python number: CUDA tensors divided by one are multiplied by its rounded reciprocal.
    max_value = scale_inv.new_full((), E4M3_MAX)
    for rows, block_rows in _row_stripes(x.shape, block):
        values = _padded_blocks(x[rows], block)
        amax = values.abs().amax(dim=(1, 3)).clamp_(min=SMALLEST_AMAX)
        scale_inv[block_rows] = scale = amax / max_value
        values *= (1.0 / scale)[:, None, :, None]
        q[rows] = _cropped_matrix(values, q[rows].shape)
    return q, scale_inv


def dequantize_blocks(
    q: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return each value times the scale of its block, as `blockwise_triton.dequantize_blocks`.

    Args:
        q: (M, N) float8_e4m3fn.
        scale_inv: (ceil(M / rows), ceil(N / columns)) fp32, the blocks' scales.
        block: the rows and columns of a block.
        dtype: the dtype of the result.

    Returns:
        (M, N) of `dtype`."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for rows, block_rows in _row_stripes(q.shape, block):
        values = _padded_blocks(q[rows], block)
        values *= scale_inv[block_rows, None, :, None]
        out[rows] = _cropped_matrix(values, out[rows].shape)
    return out


def _row_stripes(shape: torch.Size, block: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield slices of rows and of rows of blocks that cover a matrix from the top."""
    rows, columns = shape
    count = max(1, STRIPE_ELEMENTS // max(1, block[0] * columns))
    for first in range(0, -(-rows // block[0]), count):
        last = first + count
        yield slice(first * block[0], min(last * block[0], rows)), slice(first, last)


def _padded_blocks(stripe: Tensor, block: tuple[int, int]) -> Tensor:
    """Copy to fp32 as (block rows, rows, block columns, columns), edge blocks padded with 0."""
    rows, columns = stripe.shape
    blocks_down, blocks_across = -(-rows // block[0]), -(-columns // block[1])
    padded_stripe = stripe.new_zeros(
        (blocks_down * block[0], blocks_across * block[1]), dtype=torch.float32
    )
    padded_stripe[:rows, :columns] = stripe
    return padded_stripe.view(blocks_down, block[0], blocks_across, block[1])


def _cropped_matrix(values: Tensor, shape: torch.Size) -> Tensor:
    blocks_down, rows, blocks_across, columns = values.shape
    return values.view(blocks_down * rows, blocks_across * columns)[: shape[0], : shape[1]]
