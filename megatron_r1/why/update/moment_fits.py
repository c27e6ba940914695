"""Fits what a run did with its gradients to Adam's first moments in its checkpoints.

Updates are repeated until they give these moments. Fitted are how often each loss term was added,
the norms of whole gradients where `why` recomputes a part of each, and else the norm to which the
run clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import mean
from typing import NamedTuple, TypeVar

import torch

from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.why.comparison import ROUNDING_BY_DTYPE, CannotRecompute
from megatron_r1.why.update.adam import Moments, gradient_norm
from megatron_r1.why.update.checkpoint_after import CheckpointAfter
from megatron_r1.why.update.step_updates import StepUpdates, Trace
from megatron_r1.why.update.term_coefficients import FirstMoments, TermFit, fit_run
from megatron_r1.why.update.term_gradients import TermGradients
from megatron_r1.why.update.update_inputs import UpdateInputs

_Fitted = TypeVar("_Fitted")
MakeUpdates = Callable[[tuple[float, ...] | None, TermGradients | None], StepUpdates]
"""Makes the updates as the settings say, given the norms of the whole gradients (None: those that
fit the run) and where the gradients of the terms are collected (None: nowhere)."""
MAX_FIT_ROUNDS, FIT_TOLERANCE = 6, 1e-5
"""Rounds in which the norms of gradients are fitted, and the relative change that ends them."""
CLIP_TOLERANCE = 1e-3
"""The largest relative distance between the norms to which updates of one setting are clipped."""


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
        """Return the terms' gradients in updates that are made with them."""
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
        if (fitted := self._fit_moments(fit_norms)) is None:
            raise CannotRecompute("model.mtp: train, and no checkpoint says how gradients were cut")
        return fitted.norms

    @cached_property
    def fitted_clip(self) -> float | None:
        """The norm to which the run clipped its gradients, by its first moments; None where these
        say none."""
        return None if self._inputs.trains_mtp_layers else self._fit_moments(fit_clip)

    def _fit_moments(self, fit: Callable[..., _Fitted]) -> _Fitted | None:
        """Return what `fit_norms` or `fit_clip` finds; None without the run's moments or the norm
        that it logs."""
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


class FittedNorms(NamedTuple):
    """The norm of each update's whole gradient, and the updates that they were fitted to."""

    norms: tuple[float, ...]
    traces: Sequence[Trace]


def fit_norms(
    make_updates: Callable[[tuple[float, ...]], Sequence[Trace]],
    logged_norms: tuple[float, ...],
    before: Moments,
    after: Moments,
    settings: OptimizerConfig,
) -> FittedNorms:
    """Return the norm of each update's whole gradient with which clipping gives the run's first
    moments from the gradients that are computed.

    Args:
        make_updates: makes the updates of the step, given the norms.
        logged_norms: the norms to begin with.
        before: first moments before the step; a parameter that is missing has zeros.
        after: the run's first moments after the step.
        settings: the optimizer's."""
    norms = logged_norms
    traces: Sequence[Trace] = []
    for _ in range(MAX_FIT_ROUNDS):  # a later gradient depends on how the earlier ones were cut
        traces = make_updates(norms)
        previous_norms = norms
        norms = _least_squares(traces, before, after, settings)
        changes = [abs(a - b) for a, b in zip(previous_norms, norms, strict=True)]
        if max(changes) <= FIT_TOLERANCE * max(norms):
            break
    return FittedNorms(norms, traces)


def fit_clip(
    make_updates: Callable[[tuple[float, ...]], Sequence[Trace]],
    logged_norms: tuple[float, ...],
    before: Moments,
    after: Moments,
    settings: OptimizerConfig,
) -> float | None:
    """Return the norm to which each gradient was clipped; None where they were clipped to different
    ones, or one was not clipped. The arguments are those of `fit_norms`."""
    norms, traces = fit_norms(make_updates, logged_norms, before, after, settings)
    if not all(norms):
        return None
    clips = [
        settings.clip_grad / fitted * gradient_norm(trace.gradients)
        for fitted, trace in zip(norms, traces, strict=True)
    ]
    return mean(clips) if max(clips) - min(clips) <= CLIP_TOLERANCE * max(clips) else None


def _least_squares(
    traces: Sequence[Trace], before: Moments, after: Moments, settings: OptimizerConfig
) -> tuple[float, ...]:
    """Return the norms that these gradients need, by least squares; 0: one was not clipped."""
    clip, beta = settings.clip_grad, settings.beta1
    count = len(traces)
    columns = [
        (1 - beta)
        * beta ** (count - 1 - index)
        * torch.cat([gradient.flatten() for gradient in trace.gradients.values()])
        for index, trace in enumerate(traces)
    ]
    target = [
        (after[name] - beta**count * before.get(name, torch.zeros(()))).flatten()
        for name in traces[0].gradients
    ]
    scales = torch.linalg.lstsq(
        torch.stack(columns, 1).double(), torch.cat(target).double()[:, None]
    ).solution[:, 0]
    return tuple(clip / float(scale) if 0 < scale < 1 else 0.0 for scale in scales)
