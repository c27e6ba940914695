"""Computes the products of FP8 training on a CPU, in plain PyTorch, in Megatron's linear layers
(`prepare_fp8_model`, which on a GPU only checks the model's sizes).

The products and tiles are those of `models.fp8`. A product's operands are what their FP8 copies
give back in fp32, and the sums are fp32. That is what the matrix units compute: a product of two
e4m3 numbers has 8 significant bits, and where scales are powers of two the product with them is
exact as well. What differs is the order of the sums, and that fp32 has all 32 bits here (Hopper's
own accumulator keeps about 14 of them, which is why DeepSeek-V3 and Transformer Engine add up in
fp32 every 128 terms). The scale of a tile is Transformer Engine's (recipe_common.cuh,
compute_scale_from_amax):

    scale = largest / amax |tile|      the largest e4m3 number is 448, the largest e5m2 57,344
    scale = 1                          where amax is 0

rounded down to a power of two if the recipe says so, and rounded in fp32 otherwise. It has no
lower limit, unlike the checkpoint format of `r1_kernels.quantize_blockwise` (amax ≥ 1e-4), which
would round the gradients of a long batch to zero."""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.config import FP8Config
from megatron_r1.models import platform
from megatron_r1.models.fp8 import E4M3, FP8Recipe, Tile, check_sizes, find_fp8_recipe
from megatron_r1.models.layers import ReplicatedLinear
from megatron_r1.models.policy_model import LMHead

_EXPONENT_BITS = 0x7F800000


def fp8_linear(x: Tensor, weight: Tensor, recipe: FP8Recipe) -> Tensor:
    """Return x (..., in) · weight (out, in) transposed, (..., out) in x's dtype, by FP8 products.

    The gradients have x's and weight's dtypes; sums are fp32, rounded once.

    Args:
        x: (..., in), any float dtype.
        weight: (out, in), any float dtype.
        recipe: tiles and formats."""
    return _Product.apply(x, weight, recipe)


class _Product(torch.autograd.Function):
    """y = r(x) r(W)ᵀ, dx = r(dy) r(W), dW = r(dy)ᵀ r(x), r the rounding to FP8 in tiles that lie
    along the summed axis.

    x (..., in), W (out, in), dy (..., out), each in its own float dtype. Saved: x and W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: FP8Recipe) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight)
        tokens = x.reshape(-1, x.shape[-1])
        y = (
            _round_operand(tokens, recipe.input_tile, recipe)
            @ _round_operand(weight, recipe.weight_tile, recipe).T
        )
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        recipe: FP8Recipe = ctx.recipe
        dy = dy.reshape(-1, weight.shape[0])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            columns = _round_operand(weight, recipe.weight_tile[::-1], recipe)
            dx = _round_operand(dy, recipe.gradient_tile, recipe, recipe.gradient_dtype) @ columns
            dx = dx.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            # Both quantized from high precision, as in Transformer Engine, not from FP8 rows.
            tokens = x.reshape(-1, x.shape[-1])
            tokens = _round_operand(tokens, recipe.input_tile[::-1], recipe)
            dy = _round_operand(dy, recipe.gradient_tile[::-1], recipe, recipe.gradient_dtype)
            dweight = (dy.T @ tokens).to(weight.dtype)
        return dx, dweight, None


def _round_operand(x: Tensor, tile: Tile, recipe: FP8Recipe, dtype: torch.dtype = E4M3) -> Tensor:
    return round_to_fp8(x, tile, dtype, recipe.power_of_two)


def round_to_fp8(x: Tensor, tile: Tile, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """Return `x` (M, N), any float, as fp32 (M, N), each value the nearest that `dtype` can hold at
    the scale of its tile.

    A tile with NaN or infinity becomes NaN as a whole. (Transformer Engine returns NaN for NaN
    only, and casts infinity to the largest number of the format: an overflow would go unnoticed.)

    Args:
        x: (M, N), any float.
        tile: rows and columns of a tile, 0 for all; those at the edge are cut off.
        dtype: the FP8 format.
        power_of_two: whether scales are rounded down to a power of two."""
    if x.numel() == 0:
        return x.float()
    rows, columns = (size or length for size, length in zip(tile, x.shape, strict=True))
    blocks_down, blocks_across = -(-x.shape[0] // rows), -(-x.shape[1] // columns)
    values = x.float()
    cut_off = (blocks_down * rows, blocks_across * columns) != x.shape
    if cut_off:
        values = values.new_zeros(blocks_down * rows, blocks_across * columns)
        values[: x.shape[0], : x.shape[1]] = x
    values = values.view(blocks_down, rows, blocks_across, columns)
    scale = _tile_scales(values.abs().amax(dim=(1, 3), keepdim=True), dtype, power_of_two)
    rounded_values = (values * scale).to(dtype).float().mul_(1.0 / scale)
    rounded_values = rounded_values.view(blocks_down * rows, blocks_across * columns)
    return rounded_values[: x.shape[0], : x.shape[1]] if cut_off else rounded_values


def _tile_scales(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """Return the fp32 factor of each tile; NaN where `amax` is not finite."""
    # A tensor, not a number: dividing a number by a CUDA tensor computes a reciprocal first.
    max_value = amax.new_tensor(torch.finfo(dtype).max)
    scale = (max_value / amax).clamp_(max=torch.finfo(torch.float32).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


def _emulate_linear_layers(model: torch.nn.Module, recipe: FP8Recipe) -> None:
    """Make every linear layer of `model` but the head compute as `recipe` does.

    Megatron's linear layers, and our ReplicatedLinear, compute their product in the method
    `_forward_impl`; only that one is replaced, so sharding, communication and parameters are
    unchanged. Embedding, head, router, norms and attention stay in high precision, as in
    DeepSeek-V3 (section 3.3.1)."""
    for module in model.modules():
        if isinstance(module, LINEAR) and not isinstance(module, LMHead):
            linear: Any = module
            linear._forward_impl = partial(_forward_impl, recipe)


def _forward_impl(
    recipe: FP8Recipe,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gradient_accumulation_fusion: bool = False,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = None,
    tp_group: ProcessGroup | None = None,
    gtp_remat_size: int = 1,
) -> Tensor:
    """Compute what Megatron's linear_with_grad_accumulation_and_async_allreduce (layers.py) does.

    `input` is (s, b, in), under sequence parallelism this rank's part of s, and `weight` is (out,
    in); the result is (s, b, out)."""
    assert not gradient_accumulation_fusion and not grad_output_buffer, "CUDA only: not emulated"
    assert gtp_remat_size == 1, "no recipe shards a weight over more than its tensor group"
    if sequence_parallel:
        # Over the tensor group, before quantizing: tiles along the tokens are then those of a
        # single process.
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = fp8_linear(input, weight, recipe)
    return output if bias is None else output + bias


def prepare_fp8_model(model: torch.nn.Module, fp8: FP8Config) -> None:
    """Check that the model's sizes fit the recipe and, without a GPU, install the emulation.

    Args:
        model: the model that `build_model` returns.
        fp8: the recipe's section.

    Raises:
        UserError: naming the weight that does not fit.
    """
    recipe = find_fp8_recipe(fp8)
    if recipe is None:
        return
    check_sizes(model, recipe)
    if not platform.has_gpu():
        _emulate_linear_layers(model, recipe)
