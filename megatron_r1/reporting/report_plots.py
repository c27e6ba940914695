"""The plots of a report: which quantities are drawn, how, and with which captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_r1.reporting.outcome import Evaluation, Metrics, Score
from megatron_r1.reporting.plots import Curve, curve_plot, stacked_plot
from megatron_r1.reporting.wording import METRICS, PHASES, finite

HERO_SIZE = (5.2, 2.7)
SMALL = (
    *("reward/mean", "kl", "entropy", "logprob_diff/mean", "routing/agreement", "clip_fraction"),
    *("grad_norm", "loss", "learning_rate", "tokens_per_second", "format/mean"),
    *("groups/zero_variance", "truncated"),
)
# These mean something only against zero; the others are read by their shape.
FROM_ZERO = {"kl", "clip_fraction", "grad_norm", "tokens_per_second", "response_length/mean"}


class Plot(NamedTuple):
    """A plot with its caption. svg: inline SVG; value: the number beside the caption."""

    label: str
    meaning: str
    svg: str
    value: str = ""


def two_curves(metrics: Metrics, evaluations: Sequence[Evaluation]) -> list[Plot]:
    """Plot accuracy and response length, with the held-out evaluations as points."""
    accuracy = _trained(metrics, "accuracy", "training samples", "accent")
    passed = [(e.step, e.passed) for e in evaluations if e.passed]
    majority = [(e.step, e.majority) for e in evaluations if e.majority]
    votes = max((e.num_votes or 0 for e in evaluations), default=0)
    accuracy += _points("held-out, pass@1", passed, "ink", "o")
    judged = [(e.step, e.accuracy) for e in evaluations if e.accuracy]
    accuracy += _points("held-out", judged, "ink", "o")
    accuracy += _points(f"held-out, majority of {votes}", majority, "ink", "D")
    length = _trained(metrics, "response_length/mean", "training samples", "second")
    lengths = [(e.step, Score(e.length)) for e in evaluations if e.length is not None]
    length += _points("held-out", lengths, "ink", "o")
    figures = []
    if accuracy:
        plot = curve_plot("accuracy", accuracy, HERO_SIZE, percent=True)
        figures.append(Plot("Accuracy", "fraction of right answers", plot))
    if length:
        plot = curve_plot("length", length, HERO_SIZE, from_zero=True)
        figures.append(Plot("Response length", "tokens, mean", plot))
    return figures


def small_plots(metrics: Metrics) -> list[Plot]:
    """Return one small plot per recorded quantity, in a fixed order."""
    figures = []
    for key in SMALL:
        metric = METRICS[key]
        curves = _trained(metrics, key, "mean", "accent")
        if not curves:
            continue
        if key == "logprob_diff/mean":
            curves += _trained(metrics, "logprob_diff/max", "largest", "second")
            curves += _trained(metrics, "logprob_diff/without_replay", "without replay", "ink")
        plot = curve_plot(
            key.replace("/", "-"),
            curves,
            percent=metric.unit == "%",
            log_scale=metric.log_scale,
            from_zero=key in FROM_ZERO,
        )
        last = next(v for m in reversed(metrics) if (v := finite(m, key)) is not None)
        label = metric.label[:1].upper() + metric.label[1:]
        figures.append(Plot(label, metric.meaning, plot, metric.format(last)))
    return figures


def time_split(metrics: Metrics) -> list[Plot]:
    """Plot the seconds of each step by phase, stacked; time in no phase is "other"."""
    timed = [m for m in metrics if any(finite(m, f"time/{phase}") for phase in PHASES)]
    if not timed:
        return []
    parts = {
        phase: np.array([max(0.0, finite(m, f"time/{phase}") or 0.0) for m in timed])
        for phase in PHASES
    }
    parts = {phase: values for phase, values in parts.items() if values.any()}
    in_phases = np.sum(list(parts.values()), axis=0)
    total = np.array([finite(m, "time/step") or 0.0 for m in timed])
    other = np.maximum(total - in_phases, 0.0)
    if other.sum() > 0.005 * in_phases.sum():
        parts["other"] = other
    plot = stacked_plot("time", _steps(timed), parts)
    mean = float((in_phases + other).mean())
    return [Plot("Where the time goes", "seconds per step", plot, f"{mean:.3g} s on average")]


def _trained(metrics: Metrics, key: str, label: str, ink: str) -> list[Curve]:
    present = [m for m in metrics if key in m]
    values = np.array([finite(m, key) for m in present], dtype=float)  # None becomes NaN
    if not len(values) or np.isnan(values).all():
        return []
    return [Curve(label, _steps(present), values, ink, noisy=key != "learning_rate")]


def _points(label: str, scores: Sequence[tuple[int, Score]], ink: str, marker: str) -> list[Curve]:
    if not scores:
        return []
    rows = [(step, score.value, score.low, score.high) for step, score in scores]
    steps, values, low, high = np.array(rows, dtype=float).T  # None becomes NaN
    return [Curve(label, steps, values, ink, marker, low, high)]


def _steps(metrics: Metrics) -> np.ndarray:
    return np.array([finite(m, "step") or 0.0 for m in metrics])
