"""A comparison of steps as text: its table, its summary, and the page docs/benchmarks/step.md."""

import datetime
from pathlib import Path
from typing import Any

from tools.bench.step.figures import RATIOS

PAGE = Path(__file__).with_name("page.md.in")


def table(comparisons: dict[str, dict[str, Any]], overlap: dict[str, float] | None) -> str:
    """Return the comparisons with TRL and the overlapped steps as a table of plain text. The ratio
    of each of TRL's rows is ours to it."""
    row = "{:12}{:18}{:>10}{:>14}{:>10}{:>12}{:>8}"
    lines = [row.format("", "", "s/step", "core s/step", "tokens", "tokens/s", "ratio")]
    for name, comparison in comparisons.items():
        rate = comparison["ours"]["tokens_per_second"]
        for system, figures in comparison.items():
            if system in RATIOS:
                continue
            ratio = rate / figures["tokens_per_second"]
            cells = [f"{figures[key]:.2f}" for key in ("seconds", "core_seconds")]
            cells += [f"{figures[key]:,.0f}" for key in ("response_tokens", "tokens_per_second")]
            lines.append(row.format(name, system, *cells, f"{ratio:.2f}" * (system != "ours")))
    if overlap is None:
        return "\n".join(lines)
    lines.append(
        "a core each, long tail: rollout {rollout:.2f} s, training and push {training:.2f} s; in "
        "turns {in_turns:.2f} s, overlapped {overlapped:.2f} s = {ratio:.2f} x the slower".format(
            **overlap
        )
    )
    return "\n".join(lines)


def summary(processor: str, comparisons: dict[str, dict[str, Any]]) -> str:
    """Return the ratios to TRL's tokens per second, on the clock and by processor time, each to the
    better of TRL's runs, one line for each of `comparisons`. Behind it the least and the greatest
    ratio of the rounds, each of one run of every system."""
    lines = [f"{processor}: tokens a second compared with TRL's, medians of all runs"]
    for name, comparison in comparisons.items():
        own_system, *peers = (
            figures["response_tokens"] / figures["core_seconds"]
            for system, figures in comparison.items()
            if system not in RATIOS
        )
        ratios = comparison.get("ratios", [comparison["ratio"]])
        lines.append(
            f"{name:12}{comparison['ratio']:6.2f} x on the clock ({min(ratios):.2f} to "
            f"{max(ratios):.2f} in {len(ratios)} rounds)"
            f"{own_system / max(peers):7.2f} x by processor time"
        )
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """Return the page `docs/benchmarks/step.md`.

    Args:
        result: the content of the benchmark's JSON file.
        cores: the number of CPU cores."""
    work = result["work"]
    return PAGE.read_text(encoding="utf-8").format(
        date=datetime.date.today().isoformat(),
        processor=result["processor"],
        cores=cores,
        load=" to ".join(f"{limit:.1f}" for limit in result["load"]),
        worth=" to ".join(f"{limit:.1f}" for limit in result["cores are worth"]),
        packages=", ".join(f"{name} {version}" for name, version in result["packages"].items()),
        long=work["long tail"],
        short=work["short"],
        repeats=result["repeats"],
        gib="; ".join(f"{name} {gib:.1f}" for name, gib in result["gib"].items()),
        summary=summary(result["processor"], result["comparisons"]),
        table=table(result["comparisons"], result["overlap"]),
    )
