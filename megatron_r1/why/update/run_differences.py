"""Says how the run's updates differ from the recomputed ones, by the checkpoint after the step: the
factors between their changes and between their gradients, and gradients that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy.transformers_adapters import trained_parameters
from megatron_r1.why.update.checkpoint_after import CheckpointAfter
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.update_inputs import UpdateInputs

ZERO_GRADIENT_TOLERANCE = 1e-3
"""Relative size of a gradient below which there is no gradient."""
MAX_MULTIPLE_RESIDUAL = 0.2
"""The largest relative distance of a change from a multiple of another that is named."""


@dataclass(frozen=True)
class RunDifferences:
    """What a checkpoint after the step says of how the run's updates differ from the recomputed.

    Attributes:
        update_factor: the multiple of the recomputed change of the weights that is nearest to the
            run's; None where even that is far from it.
        gradient_factor: the same of the gradients in Adam's first moments.
        parameters_without_gradient: those whose moments have no gradient in the run, though they
            have one when recomputed.
        norm: the norm of the recomputed gradient, mean over the updates.
        terms: the recomputed terms of the loss, with their signs, mean over the updates."""

    update_factor: float | None = None
    gradient_factor: float | None = None
    parameters_without_gradient: tuple[str, ...] = ()
    norm: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)


def find_run_differences(
    inputs: UpdateInputs,
    after: CheckpointAfter,
    updates: StepUpdates,
    norm: float,
    terms: Mapping[str, float],
) -> RunDifferences:
    """Return what the checkpoint after the step says of how the run's updates differ.

    Args:
        inputs: what the updates are made of.
        after: the checkpoint after the step.
        updates: the updates as the settings say.
        norm: the norm of their gradient, mean over them.
        terms: their terms of the loss, with their signs, mean over them."""
    shared_fields: dict[str, Any] = {"norm": norm, "terms": terms}
    if after.model is None:
        return RunDifferences(**shared_fields)
    begin, last = trained_parameters(inputs.trained_model), trained_parameters(after.model)
    updated = trained_parameters(updates.model)
    changes = [(last[name] - value, updated[name] - value) for name, value in begin.items()]
    if after.first_moments is None:
        return RunDifferences(nearest_multiple(changes), **shared_fields)
    decay = inputs.step.config.optimizer.beta1**inputs.step.config.rl.minibatches
    before = inputs.first_moments
    gradients = {
        name: tuple(
            moments[name] - decay * before.get(name, torch.zeros(()))
            for moments in (after.first_moments, updates.adam.first_moments)
        )
        for name in begin
    }
    return RunDifferences(
        nearest_multiple(changes),
        nearest_multiple(list(gradients.values())),
        without_gradient(gradients),
        **shared_fields,
    )


@torch.no_grad()
def nearest_multiple(pairs: Sequence[Sequence[Tensor]]) -> float | None:
    """Return the factor by which the recomputed tensors come nearest to the run's.

    It is the f for which Σ |run - f recomputed|² is least, over all parameters.

    Args:
        pairs: the tensor of the run and the recomputed one, of each parameter.

    Returns:
        The factor, near 0 if the run's tensors are nearly 0. None where the recomputed ones are 0,
        or where |run - f recomputed| is more than `MAX_MULTIPLE_RESIDUAL` times |run|: the run's
        tensors are then no multiple of them."""
    run_square, own_square, products = (
        sum(float((a.double() * b.double()).sum()) for a, b in tensor_pairs)
        for tensor_pairs in (
            [(pair[0], pair[0]) for pair in pairs],
            [(pair[1], pair[1]) for pair in pairs],
            pairs,
        )
    )
    if not own_square:
        return None
    factor = products / own_square
    distance = max(0.0, run_square - factor * products) ** 0.5
    return (
        factor
        if distance <= MAX_MULTIPLE_RESIDUAL * max(run_square, own_square * 1e-6) ** 0.5
        or run_square < 1e-12 * own_square
        else None
    )


def without_gradient(gradients: Mapping[str, Sequence[Tensor]]) -> tuple[str, ...]:
    """Return the parameters that have a gradient when recomputed and none in the run.

    Args:
        gradients: the run's and the recomputed gradient, by parameter."""
    return tuple(
        name
        for name, (run, recomputed) in gradients.items()
        if float(run.norm()) <= ZERO_GRADIENT_TOLERANCE * float(recomputed.norm())
    )
