"""The tables' plots as SVG, in the style and light colors of a run's report."""

import io
import re
from collections.abc import Mapping
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from examples.paper.results import Results
from examples.paper.tables import Column, PaperTable, split
from megatron_r1.reporting.page import render
from megatron_r1.reporting.plots import INKS, STYLE

PAGE_STYLE = render("reporting/templates/style.css.jinja")
COLORS = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", PAGE_STYLE.partition("@media")[0]))
ROW_INCHES, WIDTH_INCHES = 0.42, 7.6
CURVE_SIZE = (WIDTH_INCHES, 2.8)


def draw(table: PaperTable, results: Results) -> str | None:
    """Draw rows from top to bottom, or curves over steps; return None if no row has our figures."""
    panels = table.curve or [
        name
        for name in table.columns
        if any(row.ours.get(name) and results.spread(row.ours[name]) for row in table.rows.values())
    ]
    if not panels or (table.curve and not any(map(results.curve, table.curve))):
        return None
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "y" if table.curve else "x"}):
        height = CURVE_SIZE[1] if table.curve else 0.9 + ROW_INCHES * len(table.rows)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=not table.curve)[0]
        for place, panel in zip(axes, panels, strict=True):
            if table.curve:
                _curve(place, table.columns[split(panel)[1]], results.curve(panel))
            else:
                _rows(place, table, panel, results)
        return _svg(figure)


def _rows(axes: Axes, table: PaperTable, name: str, results: Results) -> None:
    """Draw seeds, mean and deviation of each row, and the published figure as a hollow mark."""
    column = table.columns[name]
    for height, row in enumerate(table.rows.values()):
        if name in row.ours and (spread := results.spread(row.ours[name])):
            below = [height + 0.2] * len(spread.values)
            axes.plot(spread.values, below, ".", color=INKS["other"])
            error = spread.deviation or 0.0
            axes.errorbar(spread.mean, height, xerr=error, capsize=3, fmt="o", color=INKS["accent"])
        published = row.published.get(name)
        if isinstance(published, float):
            share = published / 100 if column.unit == "share" else published
            axes.plot(share, height, "D", markerfacecolor="none", markeredgecolor=INKS["second"])
    axes.set_yticks(range(len(table.rows)), [row.title for row in table.rows.values()])
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INKS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _describe(axes, axes.xaxis, column)


def _curve(axes: Axes, column: Column, points: Mapping[int, Mapping[str, float]]) -> None:
    """Draw the mean over seeds, and each seed as a faint line."""
    for seed in {seed: None for by_seed in points.values() for seed in by_seed}:
        own = [(step, by_seed[seed]) for step, by_seed in points.items() if seed in by_seed]
        axes.plot(*zip(*own, strict=True), color=INKS["accent"], linewidth=0.8, alpha=0.35)
    means = [fmean(by_seed.values()) for by_seed in points.values()]
    axes.plot(list(points), means, color=INKS["accent"], marker="o", markersize=3.5)
    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _describe(axes, axes.yaxis, column)


def _describe(axes: Axes, axis, column: Column) -> None:
    axes.set_title(column.title, fontsize=9, loc="left", color=INKS["muted"])
    if column.unit == "share":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    unstamped = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=unstamped, facecolor=INKS["page"])
    svg = buffer.getvalue()
    for ink, color in INKS.items():
        svg = svg.replace(color, COLORS[ink])
    return re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", svg)
