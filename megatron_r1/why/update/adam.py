"""Makes AdamW's updates by its formula (Loshchilov and Hutter, arXiv 1711.05101, with Adam's bias
correction)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Moments = dict[str, Tensor]
"""By the parameter's name, fp32."""


def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """Return the norm of all gradients as one vector, in fp64."""
    return math.sqrt(sum(float(values.double().square().sum()) for values in gradients.values()))


@dataclass(frozen=True)
class AdamRules:
    """AdamW's settings, and the learning rate of each update; the rest are candidate causes.

    Attributes:
        learning_rates: the rate of each update.
        beta1: as `optimizer.beta1`, like the next four.
        beta2: the decay of the second moment.
        epsilon: added to its root.
        weight_decay: the fraction times the learning rate.
        clip_grad: the largest norm of the gradient.
        decays_all: norms and biases decay too.
        decays_by_gradient: the decay is a part of the gradient, as in Adam before AdamW.
        gradient_factors: what the gradient of each update is multiplied by; (): nothing.
        moment_reset: "": never; "step", "update": the moments are zero before each of them,
            though the counter goes on.
        without_gradient: parameters whose gradient is zero.
        accumulates: the gradient of each update of the step is added to the one before, as it was
            clipped.
        skipped_updates: the numbers of updates in the step that are not made, though their loss is.
        bias_count: the updates that the bias correction counts in each update; infinite: nothing
            is corrected; None: those that were made.
        norms: the norm of the whole gradient in each update, where parts of it are not computed
            here; None: the norm of the computed gradient."""

    learning_rates: tuple[float, ...]
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_grad: float
    decays_all: bool = False
    decays_by_gradient: bool = False
    gradient_factors: tuple[float, ...] = ()
    moment_reset: str = ""
    without_gradient: Collection[str] = ()
    accumulates: bool = False
    skipped_updates: Collection[int] = ()
    bias_count: float | None = None
    norms: tuple[float, ...] | None = None

    def clip_scale(self, norm: float) -> float:
        """Return what clipping multiplies a gradient by.

        Args:
            norm: the norm of the whole gradient."""
        return min(1.0, self.clip_grad / (norm + 1e-6))


class Adam:
    """AdamW on the CPU, as its formula says.

    Args:
        parameters: by name; they are changed.
        moments: first and second moments of each, which are copied; None: zeros.
        num_updates: updates that the bias correction has counted."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        moments: tuple[Moments, Moments] | None,
        num_updates: int,
    ) -> None:
        self._parameters, self.count = parameters, num_updates
        self._clipped_gradients: Moments = {}
        if moments is None:
            zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
            moments = zeros, zeros
        self.first_moments, self.second_moments = (
            {name: moment[name].detach().clone() for name in parameters} for moment in moments
        )

    @torch.no_grad()
    def step(self, gradients: Moments, rules: AdamRules, index: int) -> float:
        """Make an update and return the norm of the gradient before it is clipped.

        Args:
            gradients: by parameter; one that is missing has none.
            rules: the settings.
            index: the number of the update in the step."""
        rate = rules.learning_rates[index]
        factor = rules.gradient_factors[index] if rules.gradient_factors else 1.0
        used_gradients = {
            name: values * factor
            for name, values in gradients.items()
            if name not in rules.without_gradient
        }
        if rules.accumulates:
            used_gradients = {
                name: values + self._clipped_gradients.get(name, 0.0)
                for name, values in used_gradients.items()
            }
        norm = gradient_norm(used_gradients)
        if rules.norms is not None:
            norm = rules.norms[index]
        scale = rules.clip_scale(norm)
        if rules.accumulates:
            self._clipped_gradients = {
                name: values * scale for name, values in used_gradients.items()
            }
        if index in rules.skipped_updates:
            return norm
        self.count += 1
        count = self.count if rules.bias_count is None else rules.bias_count
        first_bias, second_bias = 1 - rules.beta1**count, 1 - rules.beta2**count
        for name, parameter in self._parameters.items():
            # As norms and biases do not.
            decays = rules.decays_all or (parameter.dim() > 1 and not name.endswith("bias"))
            decay = rules.weight_decay if decays else 0.0
            gradient = (
                used_gradients[name] * scale
                if name in used_gradients
                else torch.zeros_like(parameter)
            )
            if rules.decays_by_gradient:
                gradient, decay = gradient + decay * parameter, 0.0
            m = self.first_moments[name].lerp_(gradient, 1 - rules.beta1)
            v = (
                self.second_moments[name]
                .mul_(rules.beta2)
                .add_(gradient.square() * (1 - rules.beta2))
            )
            parameter.mul_(1 - rate * decay)
            parameter.sub_(rate / first_bias * m / ((v / second_bias).sqrt() + rules.epsilon))
        return norm

    def forget(self) -> None:
        """Set the moments to zero; the counter stays."""
        for moment in (*self.first_moments.values(), *self.second_moments.values()):
            moment.zero_()
