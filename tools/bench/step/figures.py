"""Figures of systems that are compared: medians of their steps, and ratios of these."""

import itertools
from collections import defaultdict
from statistics import median
from typing import Any

from tools.bench.step.systems import PEERS

Steps = list[dict[str, Any]]
"""One dictionary per step: "seconds" (wall clock), "core_seconds" and "response_tokens"."""
Runs = dict[tuple[str, str], list[dict[str, Any]]]
"""The records of finished runs by case and system."""
RATIOS = ("ratio", "ratios")
"""What a comparison has next to the figures of systems."""


def compare_systems(**systems: Steps) -> dict[str, Any]:
    """Return the medians of systems by name, and the ratio of the first's tokens per second to
    those of the best of the others."""
    system_medians = {name: medians(steps) for name, steps in systems.items()}
    first, *peers = (figures["tokens_per_second"] for figures in system_medians.values())
    return {**system_medians, "ratio": first / max(peers)}


def compare_runs(runs: Runs, name: str) -> dict[str, Any]:
    """Return a case's systems compared over all their runs (`compare_systems`), with "ratios", that
    of each round of one run of every system."""
    systems = ("ours", *PEERS)
    rounds = zip(*(runs[name, system] for system in systems), strict=False)
    ratios = [
        compare_systems(**{s: run["steps"] for s, run in zip(systems, records, strict=True)})
        for records in rounds
    ]
    steps = steps_of(runs)[name]
    compared = compare_systems(**{system: steps[system] for system in systems})
    return {**compared, "ratios": [ratio["ratio"] for ratio in ratios]}


def medians(steps: Steps) -> dict[str, float]:
    """Return the medians of the steps' seconds, core seconds, tokens and tokens per second, and the
    number of steps."""
    names = ("seconds", "core_seconds", "response_tokens")
    rates = [step["response_tokens"] / step["seconds"] for step in steps]
    middle = {name: median(step[name] for step in steps) for name in names}
    return {**middle, "tokens_per_second": median(rates), "steps": len(steps)}


def overlap_ratio(in_turns: Steps, at_once: Steps) -> dict[str, float]:
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


def steps_of(runs: Runs) -> dict[str, dict[str, Steps]]:
    """Return the steps of all runs, by case and system."""
    steps: dict[str, dict[str, Steps]] = defaultdict(dict)
    for (name, system), records in runs.items():
        if records:
            steps[name][system] = list(itertools.chain(*(r["steps"] for r in records)))
    return steps
