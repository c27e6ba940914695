"""The figure of an evaluation: a panel per benchmark, pass@k and cons@k over the number of samples,
or win rates."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_r1.base.files import atomic_writer
from megatron_r1.evaluation.estimates import Estimate
from megatron_r1.evaluation.summary import Summary

NUM_COLUMNS = 3
PASS_COLOR, VOTE_COLOR = "#2b66d9", "#c2760c"


def write_figure(path: Path, summaries: Sequence[Summary]) -> Path:
    """Write a PNG with a panel per benchmark: points are estimates, bands their 95% intervals."""
    columns = min(NUM_COLUMNS, len(summaries))
    rows = -(-len(summaries) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, summary in zip(grid.flat, summaries, strict=False):
        _draw_panel(axes, summary)
    for axes in list(grid.flat)[len(summaries) :]:
        axes.set_visible(False)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return path


def _draw_panel(axes: Axes, summary: Summary) -> None:
    axes.set_title(summary.title, fontsize=10)
    if summary.pass_at_k:
        _draw_curve(axes, "pass@k", summary.pass_at_k, PASS_COLOR)
        if len(summary.cons_at_k) > 1:
            _draw_curve(axes, "cons@k", summary.cons_at_k, VOTE_COLOR)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(summary.pass_at_k), [str(k) for k in summary.pass_at_k])
        axes.minorticks_off()
        axes.set_xlabel("k, samples per question")
    else:
        _draw_curve(axes, "win rate", {1: summary.metrics["win_rate"]}, PASS_COLOR)
        _draw_curve(axes, "at equal length", {2: summary.metrics["lc_win_rate"]}, VOTE_COLOR)
        axes.set_xlim(0, 3)
        axes.set_xticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _draw_curve(axes: Axes, label: str, curve: Mapping[int, Estimate], color: str) -> None:
    sizes = list(curve)
    values = [curve[k].value for k in sizes]
    low = np.array([curve[k].low for k in sizes], np.float64)  # None becomes NaN
    high = np.array([curve[k].high for k in sizes], np.float64)
    if len(sizes) > 1:
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.vlines(sizes, low, high, color=color, alpha=0.5)
    axes.plot(sizes, values, color=color, marker="o", markersize=4, label=label)
