"""The recipes of FP8 training: tiles, formats and the sizes that they require.

On a GPU Transformer Engine computes the products (`models.megatron_config`), on a CPU
`models.fp8_emulation`. docs/fp8.md lists what is quantized and what has been checked.

A linear layer y = x Wᵀ has three products, each of two FP8 operands summed in fp32:

    fprop  y  = x · Wᵀ      summed along the input features
    dgrad  dx = dy · W      summed along the output features
    wgrad  dW = dyᵀ · x     summed along the tokens

The values of a tile share a scale, and a tile lies along the summed axis: x and dy are tiled again
for wgrad, in columns of tokens where fprop and dgrad have rows of features. DeepSeek-V3 (arXiv
2412.19437 section 3.3): tiles of 128 for x and dy, blocks of 128 x 128 for W, e4m3 everywhere.
MXFP8 (OCP Microscaling Formats 1.0): 32 for all three, scales that are powers of two."""

import re
from dataclasses import dataclass

import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import FP8Config

__all__ = ["FP8Recipe", "find_fp8_recipe", "token_multiple"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# Megatron's names, with its own layers and with Transformer Engine's (experts': weight0, …).
_PRODUCT = re.compile(r"\b(linear_\w+|eh_proj)\.weight\d*$")

Tile = tuple[int, int]
"""Rows and columns that share a scale; 0: all of them."""


@dataclass(frozen=True)
class FP8Recipe:
    """One FP8 recipe.

    Attributes:
        name: the value of `fp8.recipe`.
        input_tile: tile of x (tokens, in) where columns are summed; transposed where rows are.
        weight_tile: tile of W (out, in) where columns are summed; transposed where rows are.
        gradient_tile: tile of dy (tokens, out) where columns are summed; transposed where rows are.
        gradient_dtype: E4M3 or E5M2, of dy; inputs and weights are E4M3.
        power_of_two: whether scales are rounded down to a power of two.
        size_multiple: required of every feature size, and of an expert's tokens (which Megatron
            pads), by the matrix units.
        token_multiple: required of the tokens of a micro-batch on each tensor-parallel rank.
    """

    name: str
    input_tile: Tile
    weight_tile: Tile
    gradient_tile: Tile
    gradient_dtype: torch.dtype
    power_of_two: bool
    size_multiple: int
    token_multiple: int


def find_fp8_recipe(fp8: FP8Config) -> FP8Recipe | None:
    """Return the recipe of section `fp8`, or None."""
    if fp8.recipe == "none":
        return None
    tiles, size_multiple, token_multiple = _SHAPES[fp8.recipe]
    return FP8Recipe(
        fp8.recipe,
        *tiles,
        gradient_dtype=E5M2 if fp8.gradient_format == "e5m2" else E4M3,
        power_of_two=fp8.scale_kind == "power_of_two",
        size_multiple=size_multiple,
        token_multiple=token_multiple,
    )


# 16 and 32 are Megatron's get_fp8_align_size. For blockwise 16 tokens suffice, too, but Transformer
# Engine gathers a sequence-parallel input in FP8 only where a rank's part is whole tiles
# (Float8BlockQuantizer.is_quantizable).
_SHAPES: dict[str, tuple[tuple[Tile, Tile, Tile], int, int]] = {
    "blockwise": (((1, 128), (128, 128), (1, 128)), 16, 128),
    "tensorwise": (((0, 0), (0, 0), (0, 0)), 16, 16),
    "mxfp8": (((1, 32), (1, 32), (1, 32)), 32, 32),
}


def check_sizes(model: torch.nn.Module, recipe: FP8Recipe) -> None:
    """Raise UserError for a weight with a size, on this rank, that the matrix units do not support.

    Tiles that are cut off at the edge are supported (DeepSeek-V3's 576 latent rows)."""
    for name, weight in model.named_parameters():
        if _PRODUCT.search(name) and any(size % recipe.size_multiple for size in weight.shape):
            raise UserError(
                f"fp8.recipe={recipe.name} needs sizes that are multiples of "
                f"{recipe.size_multiple}; {name} is {tuple(weight.shape)} on this rank. Use a "
                "smaller parallel.tensor or parallel.expert_tensor if that would make it one, "
                "or fp8.recipe=none",
                key="fp8.recipe",
                cause=Cause.INDIVISIBLE,
            )


def token_multiple(fp8: FP8Config) -> int:
    """Return the number that divides the tokens of a micro-batch on each tensor-parallel rank."""
    recipe = find_fp8_recipe(fp8)
    return recipe.token_multiple if recipe else 1
