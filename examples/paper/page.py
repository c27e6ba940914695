"""Writes docs/paper.md: the tables, published and ours, and whether the directions agree.

The plots of the tables are SVG, in the style and light colors of a run's report."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from examples.paper.tables import (
    Agreement,
    Column,
    PaperRow,
    PaperTable,
    PublishedTables,
    Results,
    Verdict,
    split,
    summary,
    verdict,
)
from megatron_r1.base.files import atomic_write
from megatron_r1.pipeline.results import Spread
from megatron_r1.reporting.formatting import format_duration, format_number, format_percent
from megatron_r1.reporting.pages import render_page
from megatron_r1.reporting.plots import INKS, STYLE

PAGE_STYLE = render_page("reporting/templates/style.css.jinja")
COLORS = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", PAGE_STYLE.partition("@media")[0]))
ROW_INCHES, WIDTH_INCHES = 0.42, 7.6
CURVE_SIZE = (WIDTH_INCHES, 2.8)


def draw_table(table: PaperTable, results: Results) -> str | None:
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
        for panel_axes, panel in zip(axes, panels, strict=True):
            if table.curve:
                _plot_curve(panel_axes, table.columns[split(panel)[1]], results.curve(panel))
            else:
                _plot_rows(panel_axes, table, panel, results)
        return _plot_svg(figure)


def _plot_rows(axes: Axes, table: PaperTable, name: str, results: Results) -> None:
    """Draw seeds, mean and deviation of each row, and the published figure as a hollow mark."""
    column = table.columns[name]
    for height, row in enumerate(table.rows.values()):
        if name in row.ours and (spread := results.spread(row.ours[name])):
            heights = [height + 0.2] * len(spread.values)
            axes.plot(spread.values, heights, ".", color=INKS["other"])
            error = spread.deviation or 0.0
            axes.errorbar(spread.mean, height, xerr=error, capsize=3, fmt="o", color=INKS["accent"])
        published = row.published.get(name)
        if isinstance(published, float):
            fraction = published / 100 if column.unit == "fraction" else published
            axes.plot(fraction, height, "D", markerfacecolor="none", markeredgecolor=INKS["second"])
    axes.set_yticks(range(len(table.rows)), [row.title for row in table.rows.values()])
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INKS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _describe_plot(axes, axes.xaxis, column)


def _plot_curve(axes: Axes, column: Column, points: Mapping[int, Mapping[str, float]]) -> None:
    """Draw the mean over seeds, and each seed as a faint line."""
    for seed in {seed: None for by_seed in points.values() for seed in by_seed}:
        own = [(step, by_seed[seed]) for step, by_seed in points.items() if seed in by_seed]
        axes.plot(*zip(*own, strict=True), color=INKS["accent"], linewidth=0.8, alpha=0.35)
    means = [fmean(by_seed.values()) for by_seed in points.values()]
    axes.plot(list(points), means, color=INKS["accent"], marker="o", markersize=3.5)
    axes.set_xlabel("steps")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _describe_plot(axes, axes.yaxis, column)


def _describe_plot(axes: Axes, axis: Any, column: Column) -> None:
    axes.set_title(column.title, fontsize=9, loc="left", color=INKS["muted"])
    if column.unit == "fraction":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def _plot_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    unstamped = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=unstamped, facecolor=INKS["page"])
    svg = buffer.getvalue()
    for ink, color in INKS.items():
        svg = svg.replace(color, COLORS[ink])
    return re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", svg)


NOTHING = "–"
INTRODUCTION = """# The paper's tables, on a laptop

`python -m examples.paper` makes this page: the comparisons of {paper}, with models of a few million
parameters on sums, riddles and small programs in two languages (examples/paper/paper.yaml). The
published figures have other models and other questions, so only the order of the rows can be
compared. A direction agrees if it holds here in every seed.

- *Ours*: mean over seeds ± standard deviation. Accuracy: sampled responses to held-out questions.
- Plots: filled marks are our mean and deviation, points the seeds, hollow marks what was published.
- Process reward models and tree search, which the paper tried and dropped, are left out.
"""


def write_page(path: Path, published: PublishedTables, results: Results) -> list[Path]:
    """Write the page, and its plots in a folder of its name; return all files.

    Missing figures leave empty cells, and the page states that it is incomplete."""
    files, sections, overview = [], [], ["| table | |", "|---|---|"]
    for name, table in published.tables.items():
        verdicts = [verdict(table, comparison, results) for comparison in table.compare]
        overview.append(
            f"| [{table.title}](#{_heading_anchor(table.title)}) | {summary(verdicts)} |"
        )
        plot, link = draw_table(table, results), ""
        if plot is not None:
            files.append(atomic_write(path.with_suffix("") / f"{name}.svg", plot))
            link = f"![{table.title}]({path.stem}/{name}.svg)"
        sections.append(_table_section(table, results, verdicts, link))
    head = [INTRODUCTION.format(paper=published.paper), _run_facts(results), *overview, ""]
    return [atomic_write(path, "\n".join([*head, *sections])), *files]


def _run_facts(results: Results) -> str:
    done, count, seconds = results.progress
    seeds, when = ", ".join(results.seeds), results.report["written"]
    facts = (
        f"Seeds {seeds}; {done} of {count} stages done, in {format_duration(seconds)}; {when}.\n"
    )
    if done == count:
        return facts
    missing = "the same command continues, and what is missing here has not been run"
    return f"{facts}\n**Not complete**: {missing}.\n"


def _heading_anchor(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    anchor = "".join(char for char in title.lower() if char.isalnum() or char in " -_")
    return anchor.replace(" ", "-")


def _table_section(table: PaperTable, results: Results, verdicts: list[Verdict], plot: str) -> str:
    parts = [
        f"## {table.title}",
        table.about.strip(),
        "\n".join(_table_lines(table, results)),
        f"Published: {table.source}.",
        f"**{summary(verdicts)}**",
        "\n".join(f"- {_verdict_sentence(table, found)}" for found in verdicts),
        plot,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table_lines(table: PaperTable, results: Results) -> list[str]:
    published = {name for row in table.rows.values() for name in row.published}
    heads, rules = [""], ["---"]
    for name, column in table.columns.items():
        sides = ["published", "ours"] if name in published else ["ours"]
        heads += [f"{column.title}, {side}" for side in sides]
        rules += ["---:"] * len(sides)
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    for row in table.rows.values():
        cells = [row.title]
        for name, column in table.columns.items():
            if name in published:
                cells.append(_published_text(row, name, column))
            cells.append(_measured_text(row, name, column, results))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _published_text(row: PaperRow, name: str, column: Column) -> str:
    value = row.published.get(name, NOTHING)
    if isinstance(value, str):
        return value
    return f"{value:g}%" if column.unit == "fraction" else f"{value:g}"


def _measured_text(row: PaperRow, name: str, column: Column, results: Results) -> str:
    spread = results.spread(row.ours[name]) if name in row.ours else None
    if spread is None:
        return NOTHING
    missing = len(results.seeds) - len(spread.values)
    partly = f" ({len(spread.values)} of {len(results.seeds)} seeds)" if missing else ""
    return format_spread(spread, column) + partly


def format_spread(spread: Spread, column: Column) -> str:
    """Format as `71.0% ± 1.2`, `0.610 ± 0.02` or `2 min 5 s ± 3.1 s`."""
    word = {"fraction": format_percent, "number": format_number, "seconds": format_duration}[
        column.unit
    ]
    if spread.deviation is None:
        return word(spread.mean)
    deviations = {
        "fraction": f"{100 * spread.deviation:.1f}",
        "number": f"{spread.deviation:.2g}",
        "seconds": format_duration(spread.deviation),
    }
    return f"{word(spread.mean)} ± {deviations[column.unit]}"


def _verdict_sentence(table: PaperTable, found: Verdict) -> str:
    comparison, column = found.comparison, table.columns[found.comparison.column]
    above, below = table.rows[comparison.above].title, table.rows[comparison.below].title
    claim = f"{column.title}: {above} above {below}"
    if found.gap is None:
        return f"{claim}: {found.state}."
    seeds = f"in {found.num_in_order} of {len(found.gap.values)} seeds"
    sentence = f"{claim} {seeds} (by {_format_gap(found.gap, column)}): {found.state}."
    if found.state is Agreement.AGREES:
        return sentence
    return f"{sentence} Different here: {comparison.otherwise}"


def _format_gap(gap: Spread, column: Column) -> str:
    if column.unit != "fraction":
        return format_spread(gap, column)
    deviation = "" if gap.deviation is None else f" ± {100 * gap.deviation:.1f}"
    return f"{100 * gap.mean:+.1f}{deviation} points"
