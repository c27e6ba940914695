"""y = x Wᵀ and its two gradients as three products of FP8 operands, in plain PyTorch.

The operands are what their FP8 copies give back in fp32 (`rounding`), and the sums are fp32. That
is what the matrix units compute: a product of two e4m3 numbers has 8 significant bits, and where
scales are powers of two the product with them is exact as well. What differs is the order of the
sums, and that fp32 is all 32 bits here (Hopper's own accumulator keeps about 14 of them, which is
why DeepSeek-V3 and Transformer Engine add up in fp32 every 128 terms)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_r1.models.fp8.recipes import E4M3, Recipe, Tile
from megatron_r1.models.fp8.rounding import round_to_fp8


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x (..., in) · weight (out, in) transposed -> (..., out) in x's dtype, by FP8 products.

    The gradients are x's and weight's dtypes; sums are fp32, rounded once."""
    return _Product.apply(x, weight, recipe)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight)
        tokens = x.reshape(-1, x.shape[-1])
        y = _round(tokens, recipe.input_tile, recipe) @ _round(weight, recipe.weight_tile, recipe).T
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dy = dy.reshape(-1, weight.shape[0])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            turned = _round(weight, recipe.weight_tile[::-1], recipe)
            dx = _round(dy, recipe.gradient_tile, recipe, recipe.gradient_dtype) @ turned
            dx = dx.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            # Both from high precision, as Transformer Engine does: not turned out of FP8 rows.
            tokens = x.reshape(-1, x.shape[-1])
            tokens = _round(tokens, recipe.input_tile[::-1], recipe)
            dy = _round(dy, recipe.gradient_tile[::-1], recipe, recipe.gradient_dtype)
            dweight = (dy.T @ tokens).to(weight.dtype)
        return dx, dweight, None


def _round(x: Tensor, tile: Tile, recipe: Recipe, dtype: torch.dtype = E4M3) -> Tensor:
    return round_to_fp8(x, tile, dtype, recipe.power_of_two)
