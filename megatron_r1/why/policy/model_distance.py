"""Computes distances between models with the same parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy.tensor_source import TensorSource
from megatron_r1.why.policy.transformers_adapters import merged_weights

MIN_GRADIENT_FRACTION = 1e-3
"""The least gradient that is more than rounding of sums in float32, over the root mean square of
its tensor's gradients."""


@torch.no_grad()
def parameter_distances(
    a: Any, b: Any, base: Any, second: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Return of every parameter and buffer the norm of a - b, and that of b - base, float64.

    Adam divides by the root of the second moment: of numbers whose gradient is rounding alone
    (below `MIN_GRADIENT_FRACTION`) the change is that rounding, grown to a step. They are left out.

    Args:
        a: a model.
        b: another with the same parameters.
        base: the model that both come from.
        second: the second moments of parameters, by name."""
    other_state, bases = b.state_dict(), base.state_dict()
    by_name = {}
    for name, tensor in a.state_dict().items():
        if not tensor.is_floating_point() or name not in other_state:
            continue
        gap = tensor.double() - other_state[name].double()
        change = other_state[name].double() - bases[name].double()
        if (moment := second.get(name)) is not None:
            is_known = (moment == 0) | (moment >= MIN_GRADIENT_FRACTION**2 * moment.mean())
            gap, change = gap * is_known, change * is_known
        by_name[name] = float(gap.norm()), float(change.norm())
    return by_name


@torch.no_grad()
def relative_distance(a: Any, b: Any) -> float:
    """Return |a - b| / |b| over all weights and buffers of two models, with their adapters."""
    other_state = merged_weights(b)
    gap_square = square = 0.0
    for name, tensor in merged_weights(a).items():
        if not tensor.is_floating_point():
            continue
        other_values = other_state[name].double()
        gap_square += float((tensor.double() - other_values).square().sum())
        square += float(other_values.square().sum())
    return math.sqrt(gap_square / square) if square else math.sqrt(gap_square)


@torch.no_grad()
def source_distance(a: TensorSource, b: TensorSource) -> float:
    """Return |a - b| / |b| over all weights, with one tensor of each in memory at a time.

    Args:
        a: weights.
        b: others of the same model."""
    gap_square = square = 0.0
    for name in b.shapes:
        other_values = b.read(name).double()
        gap_square += float((a.read(name) - other_values).square().sum())
        square += float(other_values.square().sum())
    return math.sqrt(gap_square / square) if square else math.sqrt(gap_square)
