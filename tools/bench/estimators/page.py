"""docs/benchmarks/estimators.md: what was measured, how, and the figures."""

from __future__ import annotations

import datetime
from statistics import fmean
from typing import Any

from megatron_r1.reporting.wording import percent

from .figures import TARGET, WINDOW, row
from .settings import CHOICES

TEXT = """# Every estimator on the demo's task

`python tools/bench estimators`, {date}; {cores} cores, no GPU; {packages}; seeds {seeds}.

Every algorithm of `rl.algorithm` trains the demo's base model on the demo's questions with the
demo's settings (examples/laptop): sums of three digits, {steps} steps of {outputs} answers. Of a
seed all begin with the same base model; {before} of its held-out answers are right, the mean of
what the runs measured before their first step.

*steps*: until the mean accuracy of {window} steps in a row is {target:.0%}. *held-out*: accuracy
of sampled answers to held-out questions after the last step; of several seeds mean ± deviation.
*answers*: drawn in a step; more than {outputs} where groups without a difference are replaced.

{table}

What differs from the demo's settings, and from an algorithm's own defaults:

{choices}

Every step's accuracy and a step's seconds are in [estimators.json](estimators.json); speed is
`python tools/bench step`'s subject.
"""
HEADS = ("steps", "held-out", "answers")


def table(runs: dict[str, dict[str, dict]]) -> str:
    """algorithm → seed → `figures.of_run`, as Markdown."""
    lines = [f"| algorithm | {' | '.join(HEADS)} |", "|---|" + "---:|" * len(HEADS)]
    for name, by_seed in runs.items():
        cells = row(list(by_seed.values()))
        lines.append(f"| `{name}` | {' | '.join(cells[head] for head in HEADS)} |")
    return "\n".join(lines)


def as_page(result: dict[str, Any], cores: int) -> str:
    """The page of one result of `run`."""
    runs = result["runs"]
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    before = percent(fmean(run["heldout_before"] for run in every))
    choices = [f"- `{name}`: {c.why}." for name, c in CHOICES.items() if name in runs and c.why]
    return TEXT.format(
        date=datetime.date.today().isoformat(),
        cores=cores,
        packages=", ".join(f"{name} {version}" for name, version in result["packages"].items()),
        seeds=", ".join(map(str, result["seeds"])),
        steps=result["steps"],
        outputs=result["outputs"],
        before=before,
        window=WINDOW,
        target=TARGET,
        table=table(runs),
        choices="\n".join(choices) or "- nothing",
    )
