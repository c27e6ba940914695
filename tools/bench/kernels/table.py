"""The printed tables, from the rows of the JSON file."""

from statistics import median
from typing import Any

from tools.bench.kernels.calls import OURS


def summarized(name: str, about: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return one case of the JSON file, with medians, ratios to ours and shares of the bound."""
    rows, bound = result.get("rows", []), result.get("bound")
    for row in rows:
        row["median_seconds"] = median(row["seconds"]) if row["seconds"] else None
    ours = next((row for row in rows if row["name"] == OURS), {})
    for row in rows:
        row["time_ratio"] = _ratio(row["median_seconds"], ours["median_seconds"])
        row["memory_ratio"] = _ratio(row["extra_bytes"], ours["extra_bytes"])
        row["share_of_bound"] = _ratio(bound["needed"] / bound["rate"], row["median_seconds"])
    failed = result.get("failed", "")
    return {"kernel": name, "about": about, "failed": failed, "bound": bound, "rows": rows}


def _ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def lines(case: dict[str, Any]) -> list[str]:
    """Return the aligned table of one case, with the rows that did not run at its end."""
    head = [f"{case['kernel']}: {case['about']}"]
    if case["failed"]:
        return [*head, f"  not measured: {case['failed']}"]
    bound, rows = case["bound"], case["rows"]
    head.append(f"  bound: {bound['name']}, {quantity(bound['rate'], bound['unit'] + '/s')}")
    ran = [row for row in rows if not row["not_run"]]
    errors = list(dict.fromkeys(name for row in ran for name in row["errors"]))
    width = max(len(row["name"]) for row in rows)
    columns = [" " * width, "time", "x ours", "extra memory", "x ours", "of bound"]
    columns += [f"err {name}" for name in errors] + ["computes"]
    cells = [_cells(row, errors) for row in ran]
    reasons = [f"  {r['name']:{width}}  not run: {r['not_run']}" for r in rows if r["not_run"]]
    return [*head, *(aligned([columns, *cells]) if cells else []), *reasons]


def _cells(row: dict[str, Any], errors: list[str]) -> list[str]:
    share = row["share_of_bound"]
    return [
        row["name"],
        duration(row["median_seconds"]),
        _times(row["time_ratio"]),
        "-" if row["extra_bytes"] is None else quantity(row["extra_bytes"], "B"),
        _times(row["memory_ratio"]),
        "-" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}",
        *(f"{row['errors'][name]:.1e}" if name in row["errors"] else "-" for name in errors),
        row["computes"],
    ]


def aligned(rows: list[list[str]]) -> list[str]:
    """Align numbers to the right under their headings, the first and last columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  " + "  ".join([*cells, last]).rstrip())
    return lines


def _times(ratio: float | None) -> str:
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
