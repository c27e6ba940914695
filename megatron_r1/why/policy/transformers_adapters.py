"""Adds low-rank adapters (LoRA, arXiv 2106.09685) to a model of transformers, whose factors are
then its only parameters with a gradient."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from megatron_r1.models.weights.adapter_table import A, B

EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate|up|down)_proj")
STACKED_PROJECTIONS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The weights of all routed experts of a layer in transformers, and the layers in each."""


class LowRankProducts(torch.nn.Module):
    """Adds scale B A to a weight, or to each of the layers that its rows are.

    Args:
        factors: A, (…, rank, in), and B, (…, rows, rank), of each layer; None: it has no adapter.
        rows: the rows of each layer.
        scale: alpha / rank."""

    def __init__(
        self, factors: Sequence[tuple[Tensor, Tensor] | None], rows: Sequence[int], scale: float
    ) -> None:
        super().__init__()
        self._rows, self.scale = tuple(rows), scale
        self.a, self.b = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for index, pair in enumerate(factors):
            if pair is not None:
                self.a[str(index)], self.b[str(index)] = map(torch.nn.Parameter, pair)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the merged weight, (…, rows, in)."""
        products = [
            self.scale * self.b[key] @ self.a[key]
            if (key := str(index)) in self.a
            else weight.new_zeros(*weight.shape[:-2], rows, weight.shape[-1])
            for index, rows in enumerate(self._rows)
        ]
        return weight + torch.cat(products, dim=-2)


def attach_transformers_adapters(
    model: Any, names: Sequence[str], read: Callable[[str], Tensor], scale: float
) -> None:
    """Give a model adapters, whose factors are then its only parameters with a gradient.

    Args:
        model: transformers' model, which is changed.
        names: the factors, by their layers' Hugging Face names.
        read: returns a factor.
        scale: alpha / rank."""
    model.requires_grad_(requires_grad=False)
    layers = {name.removesuffix(A) for name in names if name.endswith(A)}
    for layer in sorted(layer for layer in layers if not EXPERT.fullmatch(layer)):
        module = model.get_submodule(layer)
        factors = read(layer + A), read(layer + B)
        products = LowRankProducts([factors], [len(module.weight)], scale)
        parametrize.register_parametrization(module, "weight", products)
    for stack in sorted({match[1] for layer in layers if (match := EXPERT.fullmatch(layer))}):
        _attach_to_experts(model.get_submodule(stack), stack, layers, read, scale)


def _attach_to_experts(
    experts: Any, stack: str, layers: set[str], read: Callable[[str], Tensor], scale: float
) -> None:
    for weight_name, parts in STACKED_PROJECTIONS.items():
        weight = getattr(experts, weight_name)
        factors: list[tuple[Tensor, Tensor] | None] = []
        for part in parts:
            names = [f"{stack}.{expert}.{part}_proj" for expert in range(len(weight))]
            if names[0] in layers:
                a, b = (torch.stack([read(name + end) for name in names]) for end in (A, B))
                factors.append((a, b))
            else:
                factors.append(None)
        if any(factors):
            rows = [weight.shape[1] // len(parts)] * len(parts)
            products = LowRankProducts(factors, rows, scale)
            parametrize.register_parametrization(experts, weight_name, products)


def merge_adapters(tensors: dict[str, Tensor], factors: Mapping[str, Tensor], scale: float) -> None:
    """Add the products of adapters to the weights of their layers.

    Args:
        tensors: the weights by published name, which are changed.
        factors: the factors A and B, by their layers' names.
        scale: alpha / rank."""
    for name in factors:
        if name.endswith(A):
            layer = name.removesuffix(A)
            product = scale * factors[layer + B] @ factors[name]
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + product


def with_scale(model: Any, scale: float) -> Any | None:
    """Return a copy of a model whose adapters have another scale; None for one without adapters.

    Args:
        model: transformers' model.
        scale: in place of alpha / rank."""
    model_copy = copy.deepcopy(model)
    adapters = [module for module in model_copy.modules() if isinstance(module, LowRankProducts)]
    for products in adapters:
        products.scale = scale
    return model_copy if adapters else None


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, Tensor]:
    """Return a model's weights and buffers by name, with the products of its adapters added."""
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if ".parametrizations." not in name
    }
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            weights |= {
                f"{prefix}.{name}": getattr(module, name) for name in module.parametrizations
            }
    return weights


def trained_parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters that an optimizer changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
