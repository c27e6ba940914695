"""Fits how the run clipped its gradients to the first moments that it has. Fitted are the norms of
whole gradients where `why` recomputes a part of each, or else the norm to which the run clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import NamedTuple

import torch

from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.why.update.adam import Moments, gradient_norm
from megatron_r1.why.update.step_updates import Trace

MAX_FIT_ROUNDS, FIT_TOLERANCE = 6, 1e-5
"""Rounds in which the norms of gradients are fitted, and the relative change that ends them."""
CLIP_TOLERANCE = 1e-3
"""The largest relative distance between the norms to which updates of one setting are clipped."""


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
    ones, or one was not clipped.

    Args: as of `fit_norms`."""
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
    """Return the norms that these gradients need, by least squares; 0: one was not clipped.

    Args:
        traces: the gradients of each update.
        before: first moments before the step.
        after: the first moments of the run after it.
        settings: the optimizer's settings."""
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
