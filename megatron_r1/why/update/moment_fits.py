"""What a run did with its gradients, by updates that are made again until they give its first
moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

from megatron_r1.why.comparison import ROUNDING_BY_DTYPE, CannotRecompute
from megatron_r1.why.update.checkpoint_after import CheckpointAfter
from megatron_r1.why.update.gradient_norms import fit_clip, fit_norms
from megatron_r1.why.update.loss_terms import TermGradients
from megatron_r1.why.update.step_updates import StepUpdates
from megatron_r1.why.update.term_coefficients import FirstMoments, TermFit, fit_run
from megatron_r1.why.update.update_inputs import UpdateInputs

_Fitted = TypeVar("_Fitted")
MakeUpdates = Callable[[tuple[float, ...] | None, TermGradients | None], StepUpdates]
"""Makes the updates as the settings say, given the norms of the whole gradients (None: those that
fit the run) and where the gradients of the terms are collected (None: nowhere)."""


class MomentFits:
    """Fits of a step's updates to the first moments that the run has after it.

    Args:
        inputs: what the updates are made of.
        after: the checkpoint after the step.
        make_updates: makes the updates."""

    def __init__(
        self, inputs: UpdateInputs, after: CheckpointAfter, make_updates: MakeUpdates
    ) -> None:
        self._step, self._inputs, self._after = inputs.step, inputs, after
        self._make_updates = make_updates

    @cached_property
    def terms_reason(self) -> str:
        """Why the gradient of each term is not computed; "" where it is."""
        moments = self._step.config.optimizer.moments
        if self._after.first_moments is None:
            return f"no checkpoint of step {self._step.step} has Adam's moments"
        if moments != "float32":
            return f"optimizer.moments: {moments}, from which no gradient can be taken back"
        num_terms = len(self._inputs.loss_terms)
        if not num_terms:
            return "no response is trained on"
        num_values = sum(values.numel() for values in self._after.first_moments.values())
        copies_by_term = 4 if self._inputs.first_update is None else 5
        num_bytes = 4 * (copies_by_term * num_terms + 1) * num_values
        free_bytes = self._inputs.models.free_bytes
        if num_bytes > free_bytes:
            return (
                f"the gradients of {num_terms} terms need {num_bytes / 1e9:.0f} GB, "
                f"{free_bytes / 1e9:.0f} GB are free"
            )
        return ""

    @cached_property
    def term_gradients(self) -> TermGradients:
        """Where the gradients of the terms in the updates as the settings say are collected."""
        return TermGradients(self._inputs.loss_terms)

    def term_fit(self, make_base: Callable[[], Mapping[str, float]], max_rounds: int) -> TermFit:
        """Return the run's gradient as a combination of the terms' of its loss.

        Args:
            make_base: makes the updates as the settings say, which collects the gradients of the
                terms, and returns their metrics.
            max_rounds: as of `fit_run`.

        Raises:
            CannotRecompute: the gradients are not known."""
        self._inputs.check_updates()
        if self.terms_reason or self._after.first_moments is None:
            raise CannotRecompute(self.terms_reason)
        base_metrics, settings = make_base(), self._step.config.optimizer
        logged_norm = self._step.metrics_row.get("grad_norm")
        norm = (
            logged_norm
            if isinstance(logged_norm, int | float)
            else base_metrics.get("grad_norm", 0.0)
        )
        return fit_run(
            self.term_gradients,
            self._remade_terms,
            FirstMoments(
                self._inputs.first_moments,
                self._after.first_moments,
                settings.beta1**self._step.config.rl.minibatches,
            ),
            ROUNDING_BY_DTYPE[self._step.run_config.model.dtype],
            float(norm),
            max_rounds,
        )

    def _remade_terms(
        self, coefficients: Mapping[str, float], norms: tuple[float, ...]
    ) -> TermGradients:
        """Return the terms' gradients in updates that are made with them.

        Args:
            coefficients: how often each term is added.
            norms: the norm of each update's gradient, unless a part of it is not computed here."""
        gradients = TermGradients(self._inputs.loss_terms, coefficients)
        self._make_updates(None if self._inputs.trains_mtp_layers else norms, gradients)
        return gradients

    @cached_property
    def norms(self) -> tuple[float, ...] | None:
        """The norms of whole gradients, where parts of them are not computed here: those with which
        clipping gives the run's first moments from the gradients that are.

        Raises:
            CannotRecompute: there is no checkpoint after the step."""
        if not self._inputs.trains_mtp_layers:
            return None
        if (fitted := self._fit(fit_norms)) is None:
            raise CannotRecompute("model.mtp: train, and no checkpoint says how gradients were cut")
        return fitted.norms

    @cached_property
    def fitted_clip(self) -> float | None:
        """The norm to which the run clipped its gradients, by its first moments; None where these
        say none."""
        return None if self._inputs.trains_mtp_layers else self._fit(fit_clip)

    def _fit(self, fit: Callable[..., _Fitted]) -> _Fitted | None:
        """Return what a function of `gradient_norms` finds; None without the run's moments or
        the norm that it logs."""
        logged_norm = self._step.metrics_row.get("grad_norm")
        if self._after.first_moments is None or not isinstance(logged_norm, int | float):
            return None
        return fit(
            lambda norms: self._make_updates(norms, None).traces,
            (float(logged_norm),) * self._step.config.rl.minibatches,
            self._inputs.first_moments,
            self._after.first_moments,
            self._step.config.optimizer,
        )
