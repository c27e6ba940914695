"""Reads the weights and Adam's moments that a run has after a step, and says how far others are
from them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from megatron_r1.why.policy import checkpoint_model, model_distance
from megatron_r1.why.update.adam import Adam, Moments
from megatron_r1.why.update.update_inputs import UpdateInputs


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
