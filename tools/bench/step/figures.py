"""From single steps to the figures that are claimed."""

from __future__ import annotations

from statistics import median
from typing import Any

Steps = list[dict[str, Any]]
"""Each with "seconds", of the whole step on the clock, "core_seconds" and "response_tokens"."""


def compared(ours: Steps, theirs: Steps) -> dict[str, Any]:
    """Medians of both, and ours over theirs in tokens per second."""
    both = {"ours": medians(ours), "trl": medians(theirs)}
    rates = [both[system]["tokens_per_second"] for system in ("ours", "trl")]
    return {**both, "ratio": rates[0] / rates[1]}


def medians(steps: Steps) -> dict[str, float]:
    names = ("seconds", "core_seconds", "response_tokens")
    rates = [step["response_tokens"] / step["seconds"] for step in steps]
    middle = {name: median(step[name] for step in steps) for name in names}
    return {**middle, "tokens_per_second": median(rates), "steps": len(steps)}


def overlapped(in_turns: Steps, at_once: Steps) -> dict[str, float]:
    """How much of the shorter part is not hidden: the overlapped step over the longer of rollout
    and training, each from the run in which they take turns. Training: with the push, which an
    overlapped step waits for too."""
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
    """What a person reads."""
    row = "{:12}{:8}{:>10}{:>14}{:>10}{:>12}{:>8}"
    lines = [row.format("", "", "s/step", "core s/step", "tokens", "tokens/s", "ratio")]
    for name, comparison in comparisons.items():
        for system in ("ours", "trl"):
            of = comparison[system]
            ratio = f"{comparison['ratio']:.2f}" if system == "ours" else ""
            cells = (
                f"{of['seconds']:.2f}",
                f"{of['core_seconds']:.2f}",
                f"{of['response_tokens']:,.0f}",
                f"{of['tokens_per_second']:,.0f}",
            )
            lines.append(row.format(name, system, *cells, ratio))
    lines.append(
        "a core each, long tail: rollout {rollout:.2f} s, training and push {training:.2f} s; in "
        "turns {in_turns:.2f} s, overlapped {overlapped:.2f} s = {ratio:.2f} x the slower".format(
            **overlap
        )
    )
    return "\n".join(lines)
