"""From the lines of runs to the figures that are claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from megatron_r1.workflow.figures import Spread

TARGET, WINDOW = 0.8, 3
"""Accuracy that is to be reached, by the mean of so many steps in a row."""

Lines = Sequence[Mapping[str, Any]]


def steps_until(accuracies: Sequence[float], target: float = TARGET) -> int | None:
    """The first step, from 1, whose accuracy and that of the WINDOW - 1 steps before it have a
    mean of at least `target`; None where none has."""
    for step in range(WINDOW, len(accuracies) + 1):
        if fmean(accuracies[step - WINDOW : step]) >= target:
            return step
    return None


def of_run(metrics: Lines, evaluations: Lines, questions: int, group_size: int) -> dict[str, Any]:
    """Of one run. metrics: a line per step, in order. questions, group_size: what a step trains on.

    seconds_per_step: the median without the first step, which pays for warming up.
    answers_per_step: mean of those drawn, in groups that were passed over too.
    """
    by_step = sorted(evaluations, key=lambda line: line["step"])
    passed_over = fmean(line["groups/passed_over"] for line in metrics)
    return {
        "steps": len(metrics),
        "steps_until_target": steps_until([line["accuracy"] for line in metrics]),
        "heldout_before": by_step[0]["eval/pass@1"],
        "heldout": by_step[-1]["eval/pass@1"],
        "heldout_interval": [by_step[-1][f"interval/pass@1/{end}"] for end in ("low", "high")],
        "seconds_per_step": median(line["time/step"] for line in metrics[1:]),
        "answers_per_step": group_size * (questions + passed_over),
        "accuracy": [line["accuracy"] for line in metrics],
    }


def row(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the table says of one algorithm: of its runs, one per seed."""
    return {
        "steps": _steps([run["steps_until_target"] for run in runs]),
        "held-out": Spread.of([run["heldout"] for run in runs]).worded("accuracy"),
        "answers": f"{fmean(run['answers_per_step'] for run in runs):,.0f}",
    }


def _steps(counts: Sequence[int | None]) -> str:
    """`14`, `14.3 ± 1.5`, `14.0 in 2 of 3 seeds`, `never`"""
    reached = [count for count in counts if count is not None]
    if not reached:
        return "never"
    if len(counts) == 1:
        return str(reached[0])
    if len(reached) < len(counts):
        return f"{fmean(reached):.1f} in {len(reached)} of {len(counts)} seeds"
    spread = Spread.of(reached)
    return f"{spread.mean:.1f} ± {spread.deviation:.1f}"
