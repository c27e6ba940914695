"""The published figures of single steps, as a table and as docs/benchmarks/step.md."""

import datetime
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).with_name("page.md.in")
Steps = list[dict[str, Any]]
"""One dictionary per step: "seconds" (wall clock), "core_seconds" and "response_tokens"."""


def compared(**systems: Steps) -> dict[str, Any]:
    """Return the medians of systems by name, and the ratio of the first's tokens per second to
    those of the best of the others."""
    found = {name: medians(steps) for name, steps in systems.items()}
    first, *others = (of["tokens_per_second"] for of in found.values())
    return {**found, "ratio": first / max(others)}


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


def table(comparisons: dict[str, dict], overlap: dict[str, float] | None) -> str:
    """Return the comparisons with TRL and the overlapped steps as a table of plain text. The ratio
    of each of TRL's rows is ours to it."""
    row = "{:12}{:18}{:>10}{:>14}{:>10}{:>12}{:>8}"
    lines = [row.format("", "", "s/step", "core s/step", "tokens", "tokens/s", "ratio")]
    for name, comparison in comparisons.items():
        rate = comparison["ours"]["tokens_per_second"]
        for system, of in comparison.items():
            if system == "ratio":
                continue
            ratio = rate / of["tokens_per_second"]
            cells = [f"{of[key]:.2f}" for key in ("seconds", "core_seconds")]
            cells += [f"{of[key]:,.0f}" for key in ("response_tokens", "tokens_per_second")]
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


def summary(processor: str, comparisons: dict[str, dict]) -> str:
    """Return the ratios to TRL's tokens per second, on the clock and by processor time, each to the
    better of TRL's runs, one line for each of `comparisons`."""
    lines = [f"{processor}: tokens a second beside TRL's, medians of all runs"]
    for name, comparison in comparisons.items():
        ours, *peers = (
            of["response_tokens"] / of["core_seconds"]
            for system, of in comparison.items()
            if system != "ratio"
        )
        lines.append(
            f"{name:12}{comparison['ratio']:6.2f} x on the clock"
            f"{ours / max(peers):7.2f} x by processor time"
        )
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """Return the page `docs/benchmarks/step.md`. cores: number of CPU cores."""
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
