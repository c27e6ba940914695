"""A matrix as its FP8 copy gives it back: scaled by tile, rounded to 8 bits, scaled back.

The scale of a tile is Transformer Engine's (recipe_common.cuh, compute_scale_from_amax):

    scale = largest / amax |tile|      the largest e4m3 number is 448, the largest e5m2 57,344
    scale = 1                          where amax is 0

rounded down to a power of two if asked, and rounded in fp32 otherwise. It has no floor, unlike the
checkpoint format of `r1_kernels.quantize_blockwise` (amax ≥ 1e-4), which would round the gradients
of a long batch to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_r1.models.fp8.recipes import Tile

_EXPONENT_BITS = 0x7F800000


def round_to_fp8(x: Tensor, tile: Tile, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """`x` (M, N), any float -> fp32 (M, N), each value the nearest that `dtype` holds at the scale
    of its tile.

    tile: rows and columns, 0 for all; those at the edge are cut off. A tile that holds NaN or
    infinity comes back NaN whole. (Transformer Engine gives NaN for NaN alone, and casts infinity
    to the largest number of the format: a run that overflows would go on unseen.)"""
    if x.numel() == 0:
        return x.float()
    rows, columns = (size or whole for size, whole in zip(tile, x.shape, strict=True))
    down, across = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    values = x.float()
    cut_off = (down * rows, across * columns) != x.shape
    if cut_off:
        values = values.new_zeros(down * rows, across * columns)
        values[: x.shape[0], : x.shape[1]] = x
    values = values.view(down, rows, across, columns)
    scale = _scale(values.abs().amax(dim=(1, 3), keepdim=True), dtype, power_of_two)
    rounded = (values * scale).to(dtype).float().mul_(1.0 / scale)
    rounded = rounded.view(down * rows, across * columns)
    return rounded[: x.shape[0], : x.shape[1]] if cut_off else rounded


def _scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """What a tile is multiplied by, fp32; NaN where `amax` is not finite."""
    # A tensor, not a number: CUDA tensors divided into a number go through its reciprocal.
    largest = amax.new_tensor(torch.finfo(dtype).max)
    scale = (largest / amax).clamp_(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)
