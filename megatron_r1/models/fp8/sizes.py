"""Whether the matrices of a model can be multiplied in FP8."""

from __future__ import annotations

import re

import torch

from megatron_r1.errors import UserError
from megatron_r1.models.fp8.recipes import Recipe

# Megatron's names, with its own layers and with Transformer Engine's (experts': weight0, …).
_PRODUCT = re.compile(r"\b(linear_\w+|eh_proj)\.weight\d*$")


def check_sizes(model: torch.nn.Module, recipe: Recipe) -> None:
    """Raises UserError naming the first weight with a size, on this rank, that the matrix units
    cannot take; a tile that the edge cuts off is fine (DeepSeek-V3's 576 latent rows)."""
    for name, weight in model.named_parameters():
        if _PRODUCT.search(name) and any(size % recipe.size_multiple for size in weight.shape):
            raise UserError(
                f"fp8.recipe={recipe.name} needs sizes that are multiples of "
                f"{recipe.size_multiple}; {name} is {tuple(weight.shape)} on this rank. Use a "
                "smaller parallel.tensor or parallel.expert_tensor if that would make it one, "
                "or fp8.recipe=none"
            )
