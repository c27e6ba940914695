"""The report of a run: one self-contained HTML file to read, keep, print or send."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.reporting.evaluations import Evaluation, HeldoutEstimate, merge_evaluations
from megatron_r1.reporting.formatting import (
    format_duration,
    format_number,
    format_percent,
    make_printable,
)
from megatron_r1.reporting.metric_table import KNOWN_METRICS, TIMED_PHASES, shown_metrics
from megatron_r1.reporting.outcome import (
    MetricLines,
    finite_values,
    first_and_last,
    num_steps,
    outcome_sentence,
)
from megatron_r1.reporting.pages import render_page
from megatron_r1.reporting.plots import Curve, curve_plot, stacked_plot
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.samples import choose_samples

HERO_SIZE = (5.2, 2.7)
SMALL_PLOT_METRICS = (
    "reward/mean",
    "kl",
    "entropy",
    "logprob_diff/mean",
    "routing/agreement",
    "clip_fraction",
    "grad_norm",
    "loss",
    "learning_rate",
    "tokens_per_second",
    "format/mean",
    "groups/zero_variance",
    "truncated",
)
# These mean something only against zero; the others are read by their shape.
ZERO_BASED_METRICS = {
    "kl",
    "clip_fraction",
    "grad_norm",
    "tokens_per_second",
    "response_length/mean",
}


class Plot(NamedTuple):
    """A plot with its caption.

    Attributes:
        label: the caption.
        meaning: what the quantity says, below the caption.
        svg: inline SVG.
        value: the number next to the caption."""

    label: str
    meaning: str
    svg: str
    value: str = ""


def write_run_report(
    run_folder: RunFolder | str | Path,
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
    next_commands: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `report.html` into the folder from the files in it, and return its path.

    Any run will do: one step, no evaluations, supervised training, or nothing recorded yet.

    Args:
        run_folder: the run's.
        title: the run's name; default: the folder's.
        facts: what was run, in order, such as {"model": "DeepSeek-V3 shape, 3 layers",
            "parameters": "1.36M", "device": "2 CPU cores"}; steps, duration and date are added.
        next_commands: (comment, command) pairs to try next.

    Raises:
        UserError: it is not a folder.
    """
    folder = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    if not folder.path.is_dir():
        raise UserError(
            f"{folder.path} is not a folder; give the folder of a run",
            key="folder",
            cause=Cause.NOT_FOUND,
        )
    metrics = folder.read_metrics()
    heldout = merge_evaluations([*metrics, *folder.read_evaluations()])
    settings = folder.read_config()
    weights = (settings.get("rewards") or {}).get("weights")
    html = render_page(
        "reporting/templates/run.html.jinja",
        title=make_printable(title or folder.path.resolve().name),
        run_facts={**(facts or {}), **_measured_facts(folder, metrics)},
        outcome=run_headline(folder),
        advice=[(line["step"], make_printable(line["text"])) for line in folder.read_advice()],
        tiles=_headline_tiles(metrics, heldout),
        curves=_two_curves(metrics, heldout) if metrics else [],
        temperatures=_differing_temperatures(settings) if heldout else None,
        small=_small_plots([shown_metrics(line, weights) for line in metrics]),
        time_split=_time_split(metrics),
        samples=choose_samples(folder.read_samples) if metrics else None,
        settings=_settings_by_section(settings),
        next_commands=next_commands,
    )
    return atomic_write(folder.report_path, html)


def run_headline(folder: RunFolder) -> str:
    """Return the result of a run as a sentence, with its verdict by the `change_interval`."""
    metrics = folder.read_metrics()
    sentence = outcome_sentence(metrics, merge_evaluations([*metrics, *folder.read_evaluations()]))
    kind = str((folder.read_config().get("data") or {}).get("kind") or "")
    if ":" in kind and "pass@1" in sentence:
        sentence += f" pass@1 is the mean of {kind}, a reward of your own."
    return sentence


def _differing_temperatures(settings: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the temperatures of training and held-out samples, None where they do not differ."""
    sections = (settings.get(name) or {} for name in ("rollout", "eval"))
    training, heldout = (finite_metric(section, "temperature") for section in sections)
    if training is None or heldout is None or training == heldout:
        return None
    return training, heldout


def _measured_facts(folder: RunFolder, metrics: MetricLines) -> dict[str, str]:
    if not metrics:
        return {}
    facts = {"steps": f"{num_steps(metrics):,}"}
    seconds = sum(finite_metric(line, "time/step") or 0.0 for line in metrics)
    if seconds:
        facts["time in steps"] = format_duration(seconds)
    end_time = time.localtime(folder.metrics_path.stat().st_mtime)
    facts["ended"] = time.strftime("%Y-%m-%d %H:%M", end_time)
    return facts


def _headline_tiles(
    metrics: MetricLines, heldout: Sequence[Evaluation]
) -> list[tuple[str, str, str]]:
    """Return the (name, value, note) of each number at the top of the page."""
    tiles = []
    num_votes = max((e.num_votes or 0 for e in heldout), default=0)
    for name, estimates in (
        ("held-out pass@1", [e.pass_at_1 for e in heldout if e.pass_at_1]),
        ("held-out accuracy", [e.accuracy for e in heldout if e.accuracy]),
        (f"majority vote of {num_votes}", [e.majority for e in heldout if e.majority]),
    ):
        if estimates:
            intervals = [estimate.interval for estimate in (estimates[0], estimates[-1])]
            note = f"95%: {' → '.join(dict.fromkeys(intervals))}" if all(intervals) else ""
            tiles.append(
                (
                    name,
                    _join_with_arrow(
                        format_percent(estimates[0].value), format_percent(estimates[-1].value)
                    ),
                    note,
                )
            )
    lengths = [e.length for e in heldout if e.length is not None]
    ends = (lengths[0], lengths[-1]) if lengths else first_and_last(metrics, "response_length/mean")
    if ends:
        source = "held-out, mean" if lengths else "training samples, mean"
        tiles.append(
            ("response length", _join_with_arrow(*map(format_number, ends)), f"tokens, {source}")
        )
    elif losses := first_and_last(metrics, "loss"):
        tiles.append(
            ("loss", _join_with_arrow(*map(format_number, losses)), "first and last tenth")
        )
    if gaps := finite_values(metrics, "logprob_diff/mean"):
        largest_gaps = finite_values(metrics, "logprob_diff/max")
        note = f"largest {format_number(max(largest_gaps))}" if largest_gaps else ""
        if gaps_without_replay := finite_values(metrics, "logprob_diff/without_replay"):
            note += f"; without routing replay {format_number(float(np.mean(gaps_without_replay)))}"
        tiles.append(("logprob diff to the engine", format_number(float(np.mean(gaps))), note))
    if speeds := finite_values(metrics, "tokens_per_second"):
        seconds = finite_values(metrics, "time/step")
        note = f"{format_number(float(np.median(seconds)))} s a step" if seconds else ""
        tiles.append(("tokens per second", format_number(float(np.median(speeds))), note))
    return tiles


def _join_with_arrow(first: str, last: str) -> str:
    return first if first == last else f"{first} → {last}"


def _two_curves(metrics: MetricLines, evaluations: Sequence[Evaluation]) -> list[Plot]:
    """Plot accuracy and response length, with the held-out evaluations as points."""
    accuracy = _training_curve(metrics, "accuracy", "training samples", "accent")
    pass_rates = [(e.step, e.pass_at_1) for e in evaluations if e.pass_at_1]
    majorities = [(e.step, e.majority) for e in evaluations if e.majority]
    votes = max((e.num_votes or 0 for e in evaluations), default=0)
    accuracy += _heldout_curves("held-out, pass@1", pass_rates, "ink", "o")
    accuracies = [(e.step, e.accuracy) for e in evaluations if e.accuracy]
    accuracy += _heldout_curves("held-out", accuracies, "ink", "o")
    accuracy += _heldout_curves(f"held-out, majority of {votes}", majorities, "ink", "D")
    length = _training_curve(metrics, "response_length/mean", "training samples", "second")
    lengths = [(e.step, HeldoutEstimate(e.length)) for e in evaluations if e.length is not None]
    length += _heldout_curves("held-out", lengths, "ink", "o")
    figures = []
    if accuracy:
        plot = curve_plot("accuracy", accuracy, HERO_SIZE, as_percent=True)
        figures.append(Plot("Accuracy", "fraction of right answers", plot))
    if length:
        plot = curve_plot("length", length, HERO_SIZE, from_zero=True)
        figures.append(Plot("Response length", "tokens, mean", plot))
    return figures


def _small_plots(metrics: MetricLines) -> list[Plot]:
    """Return one small plot per recorded quantity, in a fixed order."""
    figures = []
    for key in SMALL_PLOT_METRICS:
        metric = KNOWN_METRICS[key]
        curves = _training_curve(metrics, key, "mean", "accent")
        if not curves:
            continue
        if key == "logprob_diff/mean":
            curves += _training_curve(metrics, "logprob_diff/max", "largest", "second")
            curves += _training_curve(
                metrics, "logprob_diff/without_replay", "without replay", "ink"
            )
        plot = curve_plot(
            key.replace("/", "-"),
            curves,
            as_percent=metric.unit == "%",
            has_log_scale=metric.has_log_scale,
            from_zero=key in ZERO_BASED_METRICS,
        )
        last_value = next(v for m in reversed(metrics) if (v := finite_metric(m, key)) is not None)
        label = metric.label[:1].upper() + metric.label[1:]
        figures.append(Plot(label, metric.meaning, plot, metric.format(last_value)))
    return figures


def _time_split(metrics: MetricLines) -> list[Plot]:
    """Plot the seconds of each step by phase, stacked; time in no phase is "other"."""
    timed_steps = [
        m for m in metrics if any(finite_metric(m, f"time/{phase}") for phase in TIMED_PHASES)
    ]
    if not timed_steps:
        return []
    parts = {
        phase: np.array([max(0.0, finite_metric(m, f"time/{phase}") or 0.0) for m in timed_steps])
        for phase in TIMED_PHASES
    }
    parts = {phase: values for phase, values in parts.items() if values.any()}
    phase_seconds = np.sum(list(parts.values()), axis=0)
    step_seconds = np.array([finite_metric(m, "time/step") or 0.0 for m in timed_steps])
    other_seconds = np.maximum(step_seconds - phase_seconds, 0.0)
    if other_seconds.sum() > 0.005 * phase_seconds.sum():
        parts["other"] = other_seconds
    plot = stacked_plot("time", _step_numbers(timed_steps), parts)
    mean = float((phase_seconds + other_seconds).mean())
    return [Plot("Where the time goes", "seconds per step", plot, f"{mean:.3g} s on average")]


def _training_curve(metrics: MetricLines, key: str, label: str, ink: str) -> list[Curve]:
    lines = [m for m in metrics if key in m]
    values = np.array([finite_metric(m, key) for m in lines], dtype=float)  # None becomes NaN
    if not len(values) or np.isnan(values).all():
        return []
    return [Curve(label, _step_numbers(lines), values, ink, is_noisy=key != "learning_rate")]


def _heldout_curves(
    label: str, estimates: Sequence[tuple[int, HeldoutEstimate]], ink: str, marker: str
) -> list[Curve]:
    if not estimates:
        return []
    rows = [(step, estimate.value, estimate.low, estimate.high) for step, estimate in estimates]
    steps, values, low, high = np.array(rows, dtype=float).T  # None becomes NaN
    return [Curve(label, steps, values, ink, marker, low, high)]


def _step_numbers(metrics: MetricLines) -> np.ndarray:
    return np.array([finite_metric(m, "step") or 0.0 for m in metrics])


def _settings_by_section(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (section, [(key, value)]) of the run's settings; keys without a section come first."""
    sections = {str(name): value for name, value in config.items() if isinstance(value, Mapping)}
    plain_settings = {
        name: value for name, value in config.items() if not isinstance(value, Mapping)
    }
    tables = {"": plain_settings, **sections} if plain_settings else sections
    return [
        (name, [(str(key), _format_setting(value)) for key, value in section.items()])
        for name, section in tables.items()
    ]


def _format_setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_format_setting(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(_format_setting(item) for item in value) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
