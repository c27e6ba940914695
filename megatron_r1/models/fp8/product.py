"""y = x Wᵀ and its two gradients as three products of FP8 operands, in plain PyTorch.

A product's operands are what their FP8 copies give back in fp32, and the sums are fp32. That is
what the matrix units compute: a product of two e4m3 numbers has 8 significant bits, and where
scales are powers of two the product with them is exact as well. What differs is the order of the
sums, and that fp32 has all 32 bits here (Hopper's own accumulator keeps about 14 of them, which is
why DeepSeek-V3 and Transformer Engine add up in fp32 every 128 terms).

The scale of a tile is Transformer Engine's (recipe_common.cuh, compute_scale_from_amax):

    scale = largest / amax |tile|      the largest e4m3 number is 448, the largest e5m2 57,344
    scale = 1                          where amax is 0

rounded down to a power of two if the recipe says so, and rounded in fp32 otherwise. It has no lower
limit, unlike the checkpoint format of `r1_kernels.quantize_blockwise` (amax ≥ 1e-4), which would
round the gradients of a long batch to zero."""

from typing import Any

import torch
from torch import Tensor

from megatron_r1.models.fp8.recipes import E4M3, Recipe, Tile

_EXPONENT_BITS = 0x7F800000


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """Return x (..., in) · weight (out, in) transposed, (..., out) in x's dtype, by FP8 products.

    The gradients have x's and weight's dtypes; sums are fp32, rounded once."""
    return _Product.apply(x, weight, recipe)


class _Product(torch.autograd.Function):
    """y = r(x) r(W)ᵀ, dx = r(dy) r(W), dW = r(dy)ᵀ r(x), r the rounding to FP8 in tiles that lie
    along the summed axis.

    x (..., in), W (out, in), dy (..., out), each in its own float dtype. Saved: x and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight)
        tokens = x.reshape(-1, x.shape[-1])
        y = _round(tokens, recipe.input_tile, recipe) @ _round(weight, recipe.weight_tile, recipe).T
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dy = dy.reshape(-1, weight.shape[0])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            columns = _round(weight, recipe.weight_tile[::-1], recipe)
            dx = _round(dy, recipe.gradient_tile, recipe, recipe.gradient_dtype) @ columns
            dx = dx.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            # Both quantized from high precision, as in Transformer Engine, not from FP8 rows.
            tokens = x.reshape(-1, x.shape[-1])
            tokens = _round(tokens, recipe.input_tile[::-1], recipe)
            dy = _round(dy, recipe.gradient_tile[::-1], recipe, recipe.gradient_dtype)
            dweight = (dy.T @ tokens).to(weight.dtype)
        return dx, dweight, None


def _round(x: Tensor, tile: Tile, recipe: Recipe, dtype: torch.dtype = E4M3) -> Tensor:
    return round_to_fp8(x, tile, dtype, recipe.power_of_two)


def round_to_fp8(x: Tensor, tile: Tile, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """Return `x` (M, N), any float, as fp32 (M, N), each value the nearest that `dtype` can hold at
    the scale of its tile.

    tile: rows and columns, 0 for all; those at the edge are cut off. A tile with NaN or infinity
    becomes NaN as a whole. (Transformer Engine returns NaN for NaN only, and casts infinity to the
    largest number of the format: an overflow would go unnoticed.)"""
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
    """Return the fp32 factor of each tile; NaN where `amax` is not finite."""
    # A tensor, not a number: dividing a number by a CUDA tensor computes a reciprocal first.
    largest = amax.new_tensor(torch.finfo(dtype).max)
    scale = (largest / amax).clamp_(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)
