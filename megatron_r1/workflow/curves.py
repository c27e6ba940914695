"""The curves of all RL stages in common figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

import numpy as np

from megatron_r1.files.jsonl import read_lines
from megatron_r1.reporting.plots import Curve, curve_plot
from megatron_r1.reporting.wording import finite
from megatron_r1.workflow.graph import Graph
from megatron_r1.workflow.plan import Plan

INKS = ("accent", "second", "reward", "push", "train", "other", "muted", "ink")
SIZE = (5.2, 2.9)
QUANTITIES = (
    ("accuracy", "eval/pass@1", "Accuracy", "training samples; points: held-out", True),
    ("response_length/mean", "eval/response_length", "Response length", "tokens, mean", False),
    ("language/mean", "eval/language", "Language purity", "words in the target language", True),
    ("reward/mean", "", "Reward", "mean over a step's samples", False),
)
"""Key in metrics.jsonl, in evaluations.jsonl, label, meaning, whether it is a share."""

Lines = list[dict[str, Any]]


def curves_section(plans: Sequence[Plan], graph: Graph) -> str:
    """One figure per quantity, a curve per RL stage, each over its own steps: the mean of the
    seeds. Held-out points have their 95% interval, of several seeds the lowest and the highest."""
    trained = _read(plans, graph, "metrics.jsonl")
    stages = [
        name for name, runs in trained.items() if any("reward/mean" in r[-1] for r in runs if r)
    ]
    if not stages:
        return ""
    heldout = _read(plans, graph, "evaluations.jsonl")
    figures = []
    for key, heldout_key, label, meaning, is_share in QUANTITIES:
        curves = []
        for name, ink in zip(stages, _inks(len(stages)), strict=True):
            title = plans[0].stages[name].title
            curves += _curve(title, trained[name], key, ink)
            curves += _points(heldout[name], heldout_key, ink)
        if curves:
            plot = curve_plot(key.replace("/", "-"), curves, SIZE, is_share, from_zero=not is_share)
            figures.append(
                f"<figure><figcaption><b>{escape(label)}</b><span>{escape(meaning)}</span>"
                f"</figcaption>{plot}</figure>"
            )
    seeds, bars = "", "95% intervals"
    if len(plans) > 1:
        seeds, bars = f", the mean of {len(plans)} seeds", "from the lowest seed to the highest"
    return (
        f"<h2>Reinforcement learning</h2><p>Every RL stage over its own steps{seeds}; each step "
        f"faint, the moving mean bold; bars: {bars}.</p>"
        f'<div class="plots pair">{"".join(figures)}</div>'
    )


def _read(plans: Sequence[Plan], graph: Graph, file: str) -> dict[str, list[Lines]]:
    return {
        name: [list(read_lines(plan.folder_of(name) / file)) for plan in plans]
        for name in graph.order
    }


def _inks(count: int) -> list[str]:
    return [INKS[index % len(INKS)] for index in range(count)]


def _curve(title: str, runs: Sequence[Lines], key: str, ink: str) -> list[Curve]:
    by_step = _by_step(runs, key)
    return [Curve(title, *_means(by_step), ink)] if by_step else []


def _points(runs: Sequence[Lines], key: str, ink: str) -> list[Curve]:
    by_step = _by_step(runs, key)
    if not by_step:
        return []
    if len(runs) == 1:
        lines, name = {line["step"]: line for line in runs[0]}, key.removeprefix("eval/")
        ends = [
            [_or_nan(lines[step], f"interval/{name}/{end}") for step in by_step]
            for end in ("low", "high")
        ]
    else:
        ends = [[end(values) for values in by_step.values()] for end in (min, max)]
    # matplotlib leaves what begins with _ out of its legend.
    return [Curve("_held-out", *_means(by_step), ink, "o", *map(np.array, ends))]


def _by_step(runs: Sequence[Lines], key: str) -> dict[int, list[float]]:
    """Step → the values of the runs that have one, in the order of steps."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for line in run:
            if (value := finite(line, key)) is not None:
                by_step.setdefault(int(line["step"]), []).append(value)
    return dict(sorted(by_step.items()))


def _means(by_step: Mapping[int, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([*by_step], dtype=float), np.array([fmean(v) for v in by_step.values()])


def _or_nan(line: Mapping[str, Any], key: str) -> float:
    value = finite(line, key)
    return np.nan if value is None else value
