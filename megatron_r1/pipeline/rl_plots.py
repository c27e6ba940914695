"""Plots the RL stages of a pipeline, a curve for each, with held-out evaluations as points."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.stages import PipelinePlan
from megatron_r1.reporting.plots import Curve, curve_plot
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.reporting.run_report import Plot

CURVE_INKS = ("accent", "second", "reward", "push", "train", "other", "muted", "ink")
PLOT_SIZE = (5.2, 2.9)
PLOTTED_QUANTITIES = (
    ("accuracy", "eval/pass@1", "Accuracy", "training samples; points: held-out", True),
    ("response_length/mean", "eval/response_length", "Response length", "tokens, mean", False),
    ("language/mean", "eval/language", "Language purity", "words in the target language", True),
    ("reward/mean", "", "Reward", "mean over a step's samples", False),
)
"""Key in metrics.jsonl, in evaluations.jsonl, label, meaning, whether it is a share."""
Lines = list[dict[str, Any]]


def draw_rl_curves(plans: Sequence[PipelinePlan], graph: StageGraph) -> list[Plot]:
    """Return a plot per quantity, with a curve per RL stage over its own steps: the mean of the
    seeds. Held-out points have their 95% interval, or the range of several seeds."""
    runs_by_stage = _read_stage_lines(plans, graph, "metrics.jsonl")
    stages = [
        name
        for name, runs in runs_by_stage.items()
        if any("reward/mean" in r[-1] for r in runs if r)
    ]
    heldout = _read_stage_lines(plans, graph, "evaluations.jsonl")
    plots = []
    for key, heldout_key, label, meaning, is_fraction in PLOTTED_QUANTITIES:
        curves = []
        for index, name in enumerate(stages):
            ink = CURVE_INKS[index % len(CURVE_INKS)]
            if by_step := _values_by_step(runs_by_stage[name], key):
                curves.append(Curve(plans[0].stages[name].title, *_step_means(by_step), ink))
            curves += heldout_points(heldout[name], heldout_key, ink)
        if curves:
            svg = curve_plot(
                key.replace("/", "-"), curves, PLOT_SIZE, is_fraction, from_zero=not is_fraction
            )
            plots.append(Plot(label, meaning, svg))
    return plots


def heldout_points(runs: Sequence[Lines], key: str, ink: str) -> list[Curve]:
    """Return the held-out evaluations of one stage as points, none if there are none.

    Args:
        runs: the lines of evaluations.jsonl of each seed.
        key: the quantity's key in these lines.
        ink: the color of the points."""
    by_step = _values_by_step(runs, key)
    if not by_step:
        return []
    if len(runs) == 1:
        lines, name = {line["step"]: line for line in runs[0]}, key.removeprefix("eval/")
        low, high = (
            np.array(
                [finite_metric(lines[step], f"interval/{name}/{end}") for step in by_step], float
            )
            for end in ("low", "high")
        )  # None becomes NaN
    else:
        low, high = (np.array([end(v) for v in by_step.values()]) for end in (min, max))
    # matplotlib leaves labels that begin with _ out of its legend.
    return [Curve("_held-out", *_step_means(by_step), ink, "o", low, high)]


def _read_stage_lines(
    plans: Sequence[PipelinePlan], graph: StageGraph, file: str
) -> dict[str, list[Lines]]:
    return {
        name: [list(read_lines(plan.folder_of(name) / file)) for plan in plans]
        for name in graph.order
    }


def _values_by_step(runs: Sequence[Lines], key: str) -> dict[int, list[float]]:
    """Return step → the values of the runs that have one, in the order of steps."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for line in run:
            if (value := finite_metric(line, key)) is not None:
                by_step.setdefault(int(line["step"]), []).append(value)
    return dict(sorted(by_step.items()))


def _step_means(by_step: Mapping[int, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([*by_step], dtype=float), np.array([fmean(v) for v in by_step.values()])
