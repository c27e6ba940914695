"""The printed tables and their plot, from the rows of the JSON file."""

from pathlib import Path
from statistics import median
from typing import Any

from r1_kernels_bench.implementations import OURS

OURS_COLOR, PEER_COLOR = "#1f6f8b", "#b8c4cc"
ROW_INCHES, FRAME_INCHES, WIDTH_INCHES = 0.27, 0.95, 12.0
SMALLEST_BYTES = 1e3  # drawn for zero bytes, as the axis is logarithmic


def summarize(name: str, about: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return one case of the JSON file, with medians, ratios to ours and shares of the bound.

    Args:
        name: the case.
        about: what it computes.
        result: the rows and the bound, as the worker reports them."""
    rows, bound = result.get("rows", []), result.get("bound")
    for row in rows:
        row["median_seconds"] = median(row["seconds"]) if row["seconds"] else None
    own_row: dict[str, Any] = next((row for row in rows if row["name"] == OURS), {})
    min_seconds = bound["needed"] / bound["rate"] if bound else None
    for row in rows:
        row["time_ratio"] = _ratio_to_base(row["median_seconds"], own_row["median_seconds"])
        row["memory_ratio"] = _ratio_to_base(row["extra_bytes"], own_row["extra_bytes"])
        row["share_of_bound"] = _ratio_to_base(min_seconds, row["median_seconds"])
    failure = result.get("failed", "")
    return {"kernel": name, "about": about, "failed": failure, "bound": bound, "rows": rows}


def _ratio_to_base(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def lines(case: dict[str, Any]) -> list[str]:
    """Return the aligned table of one case, with the rows that did not run at its end."""
    head = [f"{case['kernel']}: {case['about']}"]
    if case["failed"]:
        return [*head, f"  not measured: {case['failed']}"]
    bound, rows = case["bound"], case["rows"]
    head.append(f"  bound: {bound['name']}, {quantity(bound['rate'], bound['unit'] + '/s')}")
    run_rows = [row for row in rows if not row["not_run"]]
    errors = list(dict.fromkeys(name for row in run_rows for name in row["errors"]))
    width = max(len(row["name"]) for row in rows)
    columns = [" " * width, "time", "x ours", "extra memory", "x ours", "of bound"]
    columns += [f"err {name}" for name in errors] + ["computes"]
    cells = [_row_cells(row, errors) for row in run_rows]
    reasons = [f"  {r['name']:{width}}  not run: {r['not_run']}" for r in rows if r["not_run"]]
    return [*head, *(align([columns, *cells]) if cells else []), *reasons]


def _row_cells(row: dict[str, Any], errors: list[str]) -> list[str]:
    fraction = row["share_of_bound"]
    return [
        row["name"],
        duration(row["median_seconds"]),
        _ratio_text(row["time_ratio"]),
        "-" if row["extra_bytes"] is None else quantity(row["extra_bytes"], "B"),
        _ratio_text(row["memory_ratio"]),
        "-" if fraction is None else f"{fraction:.0%}" if fraction >= 0.1 else f"{fraction:.1%}",
        *(f"{row['errors'][name]:.1e}" if name in row["errors"] else "-" for name in errors),
        row["computes"],
    ]


def align(rows: list[list[str]]) -> list[str]:
    """Align numbers to the right under their headings, the first and last columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last_cell in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  " + "  ".join([*cells, last_cell]).rstrip())
    return lines


def _ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    size, unit = (1, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{seconds / size:.3g} {unit}"


def quantity(value: float, unit: str) -> str:
    """Format as 1.23 GB or 790 TFLOP/s: three digits, decimal prefixes."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def draw(cases: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw time and peak extra memory of every implementation that ran: one row of two panels per
    case, bars on logarithmic axes, each with its number.

    Args:
        cases: cases of the JSON file.
        title: the title of the figure.
        path: the file."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    case_rows = [(case, [row for row in case["rows"] if row["median_seconds"]]) for case in cases]
    case_rows = [(case, rows) for case, rows in case_rows if rows]
    if not case_rows:
        return
    heights = [FRAME_INCHES + ROW_INCHES * len(rows) for _, rows in case_rows]
    size = WIDTH_INCHES, sum(heights)
    figure, panels = pyplot.subplots(
        len(case_rows), 2, figsize=size, height_ratios=heights, layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    for (case, rows), (left, right) in zip(case_rows, panels, strict=True):
        names = [row["name"] for row in rows]
        seconds = [row["median_seconds"] for row in rows]
        _draw_bars(left, names, seconds, [duration(value) for value in seconds])
        memory = [row["extra_bytes"] for row in rows]
        labels = ["not measured" if m is None else quantity(m, "B") for m in memory]
        _draw_bars(right, names, [max(m or 0, SMALLEST_BYTES) for m in memory], labels)
        left.set_title(f"{case['kernel']}: time (log scale)", fontsize=9, loc="left")
        right.set_title("peak extra memory (log scale)", fontsize=9, loc="left")
        right.set_yticklabels([])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_bars(axes: Any, names: list[str], values: list[float], labels: list[str]) -> None:
    colors = [OURS_COLOR if name.startswith(OURS) else PEER_COLOR for name in names]
    bars = axes.barh(range(len(names)), values, color=colors, height=0.75)
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 6)  # room for the labels
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
