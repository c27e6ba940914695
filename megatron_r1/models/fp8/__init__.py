"""FP8 training: computed by Transformer Engine on a GPU, emulated on a CPU.

`megatron_fields` returns fields of Megatron's configuration; `apply` checks the model built with
them and installs the emulation. docs/fp8.md lists what is quantized and what has been checked."""

from typing import Any

import torch

from megatron_r1.config import FP8Config
from megatron_r1.models import platform
from megatron_r1.models.fp8.recipes import Recipe, check_sizes, find_recipe

__all__ = ["Recipe", "apply", "find_recipe", "megatron_fields", "token_multiple"]


def megatron_fields(fp8: FP8Config) -> dict[str, Any]:
    """Return the TransformerConfig fields for `fp8`; UserError where this GPU cannot run it."""
    if fp8.recipe == "none" or not platform.has_gpu():
        return {}
    from megatron_r1.models.fp8 import transformer_engine

    return transformer_engine.megatron_fields(fp8)


def apply(model: torch.nn.Module, fp8: FP8Config) -> None:
    """Check that the model's sizes fit the recipe and, without a GPU, install the emulation.

    model: as `build_model` returns it. Raises UserError naming the weight that does not fit."""
    recipe = find_recipe(fp8)
    if recipe is None:
        return
    check_sizes(model, recipe)
    if not platform.has_gpu():
        from megatron_r1.models.fp8.emulation import emulate

        emulate(model, recipe)


def token_multiple(fp8: FP8Config) -> int:
    """Return the number that divides the tokens of a micro-batch on each tensor-parallel rank."""
    recipe = find_recipe(fp8)
    return recipe.token_multiple if recipe else 1
