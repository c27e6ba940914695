"""What the cases add up to: verdicts, the table and the page."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tools.bench import host
from tools.bench.why.cases import WhyCase
from tools.evidence.records import head

NAMED = "named"
WRONG = "wrong"
MISSED = "missed"
FAILED = "no run"
QUANTITY = "quantity"
"""The right quantity, without its cause."""
HEALTHY, ALARM = "healthy", "false alarm"
BEGIN, END = "<!-- bench why -->", "<!-- end -->"
MAX_SHOWN_CHARACTERS = 150
"""Characters of what `why` says."""
Result = Mapping[str, Any]


def verdict(case: WhyCase, result: Result) -> str:
    """Return what `why` made of a case.

    It is named (the right quantity first, with its cause), quantity (without its cause), wrong
    (another quantity), missed, no run (the run or `why` failed); healthy or false alarm for a
    healthy one.

    Args:
        case: the case.
        result: its result."""
    explanation = result.get("why")
    if explanation is None or explanation["status"] not in (0, 1) or "first" not in explanation:
        return FAILED
    first = explanation["first"]
    if case.is_healthy:
        return ALARM if first else HEALTHY
    if first is None:
        return MISSED
    if first["name"] not in case.quantity:
        return WRONG
    text = f"{first['reason']} {first['remedy']}"
    has_cause = all(re.search(pattern, text, re.IGNORECASE) for pattern in case.cause)
    return NAMED if has_cause else QUANTITY


def cost_in_steps(result: Result) -> float | None:
    """Return the seconds of `why` over the median seconds of a step of the run; None without."""
    if "why" not in result or not result.get("step_seconds"):
        return None
    return float(result["why"]["seconds"]) / median(result["step_seconds"])


def as_lines(results: Sequence[Result]) -> str:
    """Return a line for each case: what became of its seeds, and what `why` says first."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result["case"], []).append(result)
    lines = []
    for name, case_results in rows.items():
        counts = Counter(result["verdict"] for result in case_results)
        verdicts = ", ".join(
            word if len(case_results) == 1 else f"{word} {count}/{len(case_results)}"
            for word, count in counts.most_common()
        )
        # Of several, the one that is not as it should be.
        example = min(case_results, key=lambda result: result["verdict"] in (NAMED, HEALTHY))
        lines.append(f"{verdicts:22} {name}")
        if departure := _describe_departure(example):
            lines.append(f"{'':22}   {departure}")
    return "\n".join(lines)


def _describe_departure(result: Result) -> str:
    """Return the first departure of a result in at most `MAX_SHOWN_CHARACTERS` characters."""
    if result["run"]["status"]:
        return " ".join(result["run"]["error"].split())[-MAX_SHOWN_CHARACTERS:]
    first = (result.get("why") or {}).get("first")
    if not first:
        return ""
    text = f"{first['family']}: {first['name']}: {first['reason']}"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Return counts of each verdict, and the costs."""
    counts = {
        name: sum(result["verdict"] == name for result in results)
        for name in (NAMED, QUANTITY, WRONG, MISSED, FAILED, HEALTHY, ALARM)
    }
    costs = [cost for result in results if (cost := cost_in_steps(result)) is not None]
    seconds = [result["why"]["seconds"] for result in results if "why" in result]
    return {
        **counts,
        "faults": sum(counts[name] for name in (NAMED, QUANTITY, WRONG, MISSED)),
        "median_cost": median(costs) if costs else None,
        "largest_cost": max(costs, default=None),
        "median_seconds": median(seconds) if seconds else None,
        "total_seconds": sum(result["seconds"] for result in results),
    }


def summary(results: Sequence[Result]) -> str:
    """Return the figures as a few lines."""
    totals = figures(results)
    num_faults = len(
        {
            result["case"]
            for result in results
            if not result["healthy"] and result["verdict"] != FAILED
        }
    )
    lines = [
        f"{num_faults} faults, {totals['faults']} runs: {totals[NAMED]} named with their cause "
        f"({totals[NAMED] / max(1, totals['faults']):.1%}), {totals[QUANTITY]} by their quantity "
        f"alone, {totals[WRONG]} wrongly, {totals[MISSED]} missed.",
        f"False alarms in {totals[HEALTHY] + totals[ALARM]} healthy runs: {totals[ALARM]}.",
    ]
    if totals["median_cost"] is not None:
        lines.append(
            f"`why`, start-up aside: {totals['median_seconds']:.1f} s, "
            f"{totals['median_cost']:.1f} steps of the run in the median, "
            f"{totals['largest_cost']:.0f} at most."
        )
    if totals[FAILED]:
        lines.append(f"{totals[FAILED]} runs could not be made.")
    return "\n".join([*lines, f"Everything took {totals['total_seconds'] / 60:.0f} minutes."])


def as_page(results: Sequence[Result], seeds: Sequence[int]) -> str:
    """Return the whole table with its command, date and machine, as plain text.

    Args:
        results: what `run` returns.
        seeds: those of the faults."""
    heading = (
        f"python tools/bench why --seeds {','.join(map(str, seeds))}\n"
        f"commit {head(host.ROOT)}, {datetime.date.today().isoformat()}, {host.processor()}, "
        f"{host.num_cores()} cores, no GPU"
    )
    return f"{heading}\n\n{summary(results)}\n\n{as_lines(results)}\n"


def between_markers(text: str, results: Sequence[Result]) -> str:
    """Return a page of Markdown with the figures between its markers.

    Args:
        text: the page.
        results: what `run` returns.

    Raises:
        ValueError: it has no such markers."""
    before, begin, remainder = text.partition(BEGIN)
    _, end, after = remainder.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{summary(results)}\n{END}{after}"
