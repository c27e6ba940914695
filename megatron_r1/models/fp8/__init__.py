"""FP8 training: one setting, run by Transformer Engine on a GPU and emulated elsewhere.

`megatron_fields` goes into Megatron's configuration, `apply` over the model it builds; docs/fp8.md
says what is quantised where, and what has been checked."""

from __future__ import annotations

from typing import Any

import torch

from megatron_r1 import platform
from megatron_r1.config import FP8Config
from megatron_r1.models.fp8.recipes import Recipe, find_recipe
from megatron_r1.models.fp8.sizes import check_sizes

__all__ = ["Recipe", "apply", "find_recipe", "megatron_fields", "token_multiple"]


def megatron_fields(fp8: FP8Config) -> dict[str, Any]:
    """What TransformerConfig is told. Raises ValueError where a GPU cannot run `fp8`."""
    if fp8.recipe == "none" or not platform.has_gpu():
        return {}
    from megatron_r1.models.fp8 import transformer_engine

    return transformer_engine.megatron_fields(fp8)


def apply(model: torch.nn.Module, fp8: FP8Config) -> None:
    """Check that the model's sizes fit the recipe and, without a GPU, have it emulated.

    model: as `build_model` returns it. Raises ValueError naming the weight that does not fit."""
    recipe = find_recipe(fp8)
    if recipe is None:
        return
    check_sizes(model, recipe)

    if not platform.has_gpu():
        from megatron_r1.models.fp8.emulation import emulate

        emulate(model, recipe)


def token_multiple(fp8: FP8Config) -> int:
    """What the tokens of a micro-batch on each tensor-parallel rank must be a multiple of."""
    recipe = find_recipe(fp8)
    return recipe.token_multiple if recipe else 1
