"""The published figures of single steps, as a table and as docs/benchmarks/step.md."""

import datetime
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).with_name("page.md.in")
Steps = list[dict[str, Any]]
"""One dictionary per step: "seconds" (wall clock), "core_seconds" and "response_tokens"."""


def compared(**both: Steps) -> dict[str, Any]:
    """Return the medians of two systems by name, and the ratio of the first's tokens per second to
    the second's."""
    found = {name: medians(steps) for name, steps in both.items()}
    first, second = (of["tokens_per_second"] for of in found.values())
    return {**found, "ratio": first / second}


def medians(steps: Steps) -> dict[str, float]:
    """Return the medians of the steps' seconds, core seconds, tokens and tokens per second, and the
    number of steps."""
    names = ("seconds", "core_seconds", "response_tokens")
    rates = [step["response_tokens"] / step["seconds"] for step in steps]
    middle = {name: median(step[name] for step in steps) for name in names}
    return {**middle, "tokens_per_second": median(rates), "steps": len(steps)}


def overlapped(in_turns: Steps, at_once: Steps) -> dict[str, float]:
    """Return the overlapped step's ratio to the longer of rollout and training.

    Rollout and training are measured in the run in which they take turns. Training includes the
    push, for which an overlapped step waits too."""
    rollout = median(step["time/rollout"] + step["time/reward"] for step in in_turns)
    training = median(step["time/train"] + step["time/push"] for step in in_turns)
    step = median(step["seconds"] for step in at_once)
    return {
        "rollout": rollout,
        "training": training,
        "in_turns": median(step["seconds"] for step in in_turns),
        "overlapped": step,
        "ratio": step / max(rollout, training),
    }


def table(comparisons: dict[str, dict], overlap: dict[str, float]) -> str:
    """Return the comparisons with TRL and the overlapped steps as a table of plain text."""
    row = "{:12}{:8}{:>10}{:>14}{:>10}{:>12}{:>8}"
    lines = [row.format("", "", "s/step", "core s/step", "tokens", "tokens/s", "ratio")]
    for name, comparison in comparisons.items():
        for system in ("ours", "trl"):
            of, ratio = comparison[system], comparison["ratio"]
            cells = [f"{of[key]:.2f}" for key in ("seconds", "core_seconds")]
            cells += [f"{of[key]:,.0f}" for key in ("response_tokens", "tokens_per_second")]
            lines.append(row.format(name, system, *cells, f"{ratio:.2f}" * (system == "ours")))
    lines.append(
        "a core each, long tail: rollout {rollout:.2f} s, training and push {training:.2f} s; in "
        "turns {in_turns:.2f} s, overlapped {overlapped:.2f} s = {ratio:.2f} x the slower".format(
            **overlap
        )
    )
    return "\n".join(lines)


def summary(processor: str, comparisons: dict[str, dict]) -> str:
    """Return the ratios to TRL's tokens per second, on the clock and by processor time, one line
    for each of `comparisons`."""
    lines = [f"{processor}: tokens a second beside TRL's, medians of all runs"]
    for name, comparison in comparisons.items():
        ours, trl = comparison["ours"], comparison["trl"]
        cores = [of["response_tokens"] / of["core_seconds"] for of in (ours, trl)]
        lines.append(
            f"{name:12}{comparison['ratio']:6.2f} x on the clock"
            f"{cores[0] / cores[1]:7.2f} x by processor time"
        )
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """Return the page `docs/benchmarks/step.md`. cores: number of CPU cores."""
    long, short = result["work"].values()
    return PAGE.read_text(encoding="utf-8").format(
        date=datetime.date.today().isoformat(),
        processor=result["processor"],
        cores=cores,
        load=" to ".join(f"{limit:.1f}" for limit in result["load"]),
        worth=" to ".join(f"{limit:.1f}" for limit in result["cores are worth"]),
        packages=", ".join(f"{name} {version}" for name, version in result["packages"].items()),
        long=long,
        short=short,
        table=table(result["comparisons"], result["overlap"]),
    )
