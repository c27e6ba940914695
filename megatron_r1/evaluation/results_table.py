"""The table of an evaluation in the terminal: a row per benchmark, its main numbers with their
intervals as text."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_r1.evaluation.estimates import Estimate
from megatron_r1.evaluation.summary import Summary
from megatron_r1.reporting.formatting import format_number, format_percent

LOG_WIDTH = 140
WIN_RATES = {"win_rate": "wins: ", "lc_win_rate": "at equal length: "}


def print_table(summaries: Sequence[Summary]) -> None:
    """Print a row per benchmark, its main numbers with their 95% intervals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("benchmark", "questions", "pass@1", "pass@k", "cons@k", "tokens", "cut", "failed"):
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for summary in summaries:
        k, metrics, counts = summary.num_samples, summary.metrics, summary.counts
        names = (*WIN_RATES, "")
        if "win_rate" not in metrics:
            names = ("pass@1", f"pass@{k}" if k > 1 else "", f"cons@{k}" if k > 1 else "")
        table.add_row(
            summary.title,
            f"{counts['questions']:,} x {k}",
            *(
                format_estimate(n, metrics[n], with_name=n != "pass@1") if n in metrics else "–"
                for n in names
            ),
            format_estimate("length", metrics["length"]) if "length" in metrics else "–",
            format_percent(metrics["truncated"].value),
            f"{counts['ungraded']:,}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    console.print(table)


def format_estimate(metric: str, estimate: Estimate, with_name: bool = False) -> str:
    """Return an estimate as "71.0% (66.2–75.8)".

    Args:
        metric: the metric's name.
        estimate: its value.
        with_name: whether "@k: " of "pass@k" stands in front, or "wins: " and
            "at equal length: "."""
    is_length = metric == "length"
    value = format_number(estimate.value) if is_length else format_percent(estimate.value)
    prefix = WIN_RATES.get(metric) or f"@{metric.partition('@')[2]}: " if with_name else ""
    if estimate.low is None or estimate.high is None:
        return prefix + value
    low, high = estimate.low, estimate.high
    interval = f"{low:,.0f}–{high:,.0f}" if is_length else f"{100 * low:.1f}–{100 * high:.1f}"
    return f"{prefix}{value} ({interval})"
