"""A plot of the tables: time and peak extra memory of every implementation that ran."""

from pathlib import Path
from typing import Any

from tools.bench.kernels.calls import OURS
from tools.bench.kernels.table import duration, quantity

OURS_COLOR, PEER_COLOR = "#1f6f8b", "#b8c4cc"
ROW_INCHES, FRAME_INCHES, WIDTH_INCHES = 0.27, 0.95, 12.0
SMALLEST_BYTES = 1e3  # drawn for zero bytes, as the axis is logarithmic


def draw(cases: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw one row of two panels per case: bars on logarithmic axes, each with its number."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    shown = [(case, [row for row in case["rows"] if row["median_seconds"]]) for case in cases]
    shown = [(case, rows) for case, rows in shown if rows]
    if not shown:
        return
    heights = [FRAME_INCHES + ROW_INCHES * len(rows) for _, rows in shown]
    size = WIDTH_INCHES, sum(heights)
    figure, panels = pyplot.subplots(
        len(shown), 2, figsize=size, height_ratios=heights, layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    for (case, rows), (left, right) in zip(shown, panels, strict=True):
        names = [row["name"] for row in rows]
        seconds = [row["median_seconds"] for row in rows]
        _bars(left, names, seconds, [duration(value) for value in seconds])
        memory = [row["extra_bytes"] for row in rows]
        labels = ["not measured" if m is None else quantity(m, "B") for m in memory]
        _bars(right, names, [max(m or 0, SMALLEST_BYTES) for m in memory], labels)
        left.set_title(f"{case['kernel']}: time (log scale)", fontsize=9, loc="left")
        right.set_title("peak extra memory (log scale)", fontsize=9, loc="left")
        right.set_yticklabels([])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axes: Any, names: list[str], values: list[float], labels: list[str]) -> None:
    colors = [OURS_COLOR if name.startswith(OURS) else PEER_COLOR for name in names]
    bars = axes.barh(range(len(names)), values, color=colors, height=0.75)
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 6)  # room for the labels
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
