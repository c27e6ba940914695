"""The weights and Adam's moments that a run has after a step, how far others are from them, and how
the run's updates differ from the recomputed. That is said by the factors between their changes and
between their gradients, and by gradients that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy import checkpoint_model, model_distance
from megatron_r1.why.policy.transformers_adapters import trained_parameters
from megatron_r1.why.update.adam import Adam, Moments
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.update_inputs import UpdateInputs

ZERO_GRADIENT_TOLERANCE = 1e-3
"""Relative size of a gradient below which there is no gradient."""
MAX_MULTIPLE_RESIDUAL = 0.2
"""The largest relative distance of a change from a multiple of another that is named."""


class CheckpointAfter:
    """What the checkpoint after a step has of the run's updates.

    Args:
        inputs: what the updates are made of."""

    def __init__(self, inputs: UpdateInputs) -> None:
        self._step, self._inputs = inputs.step, inputs

    @cached_property
    def model(self) -> Any:
        """The trained model after the step; None where no checkpoint has it."""
        after, dtype = self._step.checkpoint_after, self._step.run_config.model.dtype
        if after is None:
            return None
        return self._inputs.models.model(
            after, "" if dtype == "float32" else f"{checkpoint_model.STATE_PREFIX}param."
        )

    @cached_property
    def moments(self) -> tuple[Moments, Moments] | None:
        """Adam's moments after the step; None where no checkpoint has them."""
        after = self._step.checkpoint_after
        if after is None or not checkpoint_model.has_part(after, checkpoint_model.STATE_PREFIX):
            return None
        return self._inputs.moments_in(after)

    @property
    def first_moments(self) -> Moments | None:
        """Adam's first moments after the step; None where no checkpoint has them."""
        return None if self.moments is None else self.moments[0]

    @torch.no_grad()
    def moment_distance(self, adam: Adam) -> float | None:
        """Return |own - run's| / |run's| of the first or second moments, the larger one; None where
        no checkpoint has them.

        Args:
            adam: an optimizer after the step's updates, whose moments are its own."""
        if self.moments is None:
            return None
        ratios = []
        for moment, run in zip(
            (adam.first_moments, adam.second_moments), self.moments, strict=True
        ):
            gap_square = sum(
                float((moment[name] - values).double().square().sum())
                for name, values in run.items()
            )
            square = sum(float(values.double().square().sum()) for values in run.values())
            ratios.append(_relative_gap(gap_square**0.5, square**0.5))
        return max(ratios)

    def change_distance(
        self, model: Any, adam: Adam
    ) -> tuple[float | None, list[tuple[str, float]]]:
        """Return |own - run's| / |run's change| of all parameters, and by name, largest first; None
        and nothing where no checkpoint has the weights.

        Args:
            model: a model after the step's updates.
            adam: the optimizer that made them."""
        if self.model is None:
            return None, []
        distance = model_distance.parameter_distances(
            model, self.model, self._inputs.trained_model, adam.second_moments
        )
        total_gap = sum(gap**2 for gap, _ in distance.values()) ** 0.5
        total_change = sum(change**2 for _, change in distance.values()) ** 0.5
        by_name = {
            name: _relative_gap(gap, change)
            for name, (gap, change) in distance.items()
            if gap or change
        }
        ordered = sorted(by_name.items(), key=lambda item: -item[1])
        return _relative_gap(total_gap, total_change), ordered


def _relative_gap(gap: float, change: float) -> float:
    return gap / change if change else (0.0 if gap == 0 else float("inf"))


@dataclass(frozen=True)
class CheckpointTraces:
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


def read_traces(
    inputs: UpdateInputs,
    after: CheckpointAfter,
    updates: StepUpdates,
    norm: float,
    terms: Mapping[str, float],
) -> CheckpointTraces:
    """Return what the checkpoint after the step says of how the run's updates differ.

    Args:
        inputs: what the updates are made of.
        after: the checkpoint after the step.
        updates: the updates as the settings say.
        norm: the norm of their gradient, mean over them.
        terms: their terms of the loss, with their signs, mean over them."""
    base_traces: dict[str, Any] = {"norm": norm, "terms": terms}
    if after.model is None:
        return CheckpointTraces(**base_traces)
    begin, last = trained_parameters(inputs.trained_model), trained_parameters(after.model)
    updated = trained_parameters(updates.model)
    changes = [(last[name] - value, updated[name] - value) for name, value in begin.items()]
    if after.first_moments is None:
        return CheckpointTraces(nearest_multiple(changes), **base_traces)
    decay = inputs.step.config.optimizer.beta1**inputs.step.config.rl.minibatches
    before = inputs.first_moments
    gradients = {
        name: tuple(
            moments[name] - decay * before.get(name, torch.zeros(()))
            for moments in (after.first_moments, updates.adam.first_moments)
        )
        for name in begin
    }
    return CheckpointTraces(
        nearest_multiple(changes),
        nearest_multiple(list(gradients.values())),
        without_gradient(gradients),
        **base_traces,
    )


@torch.no_grad()
def nearest_multiple(pairs: Sequence[Sequence[Tensor]]) -> float | None:
    """Return the f for which Σ |run - f own|² is least; None where that leaves more of it
    than `MAX_MULTIPLE_RESIDUAL`.

    Args:
        pairs: (run, own) of each parameter."""
    run, own_square, products = (
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
    distance = max(0.0, run - factor * products) ** 0.5
    return (
        factor
        if distance <= MAX_MULTIPLE_RESIDUAL * max(run, own_square * 1e-6) ** 0.5
        or run < 1e-12 * own_square
        else None
    )


def without_gradient(gradients: Mapping[str, Sequence[Tensor]]) -> tuple[str, ...]:
    """Return the parameters that have a gradient when recomputed and none in the run.

    Args:
        gradients: (run, own) by parameter."""
    return tuple(
        name
        for name, (run, recomputed) in gradients.items()
        if float(run.norm()) <= ZERO_GRADIENT_TOLERANCE * float(recomputed.norm())
    )
