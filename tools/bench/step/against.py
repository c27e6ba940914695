"""Whole steps of this checkout beside another one's: the same work, runs in turn."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from tools.bench import machine
from tools.bench.step import ours
from tools.bench.step.figures import Steps, medians
from tools.bench.step.model import Tail, write_model
from tools.bench.step.work import Work, write_questions


def run(
    chosen: argparse.Namespace, runs: dict[str, tuple[Work, dict[str, dict]]]
) -> dict[str, Any]:
    """Return, for each of `runs` (name: work and settings), medians of both checkouts, ratios of
    their tokens per second and of their processor time a token, and every step."""
    steps: dict[str, dict[str, Steps]] = {name: {"this": [], "other": []} for name in runs}
    conditions = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", Tail())
        questions = write_questions(Path(folder) / "questions.jsonl", 256)
        for turn in range(chosen.repeats):
            for name, (work, more) in runs.items():
                for side, root in (("other", chosen.against), ("this", None)):
                    conditions.append((os.getloadavg()[0], machine.cores_worth()))
                    place = Path(folder) / f"{turn} {name} {side}"
                    lines = ours.run(work, model, questions, place, chosen.steps, more, root)
                    steps[name][side] += map(_timings, lines)
                    seconds = ", ".join(f"{line['seconds']:.2f}" for line in lines)
                    print(f"{name}, {side}: {seconds} s a step", flush=True)
    comparisons = {name: _compared(**sides) for name, sides in steps.items()}
    for name, comparison in comparisons.items():
        print(
            f"{name}: this has {comparison['ratio']:.3f} x the tokens/s of the other, and takes "
            f"{comparison['core_ratio']:.3f} x its processor time a token"
        )
    return {"conditions": conditions, "comparisons": comparisons, "steps": steps}


def _timings(line: dict[str, Any]) -> dict[str, Any]:
    kept = ("seconds", "core_seconds", "response_tokens")
    return {key: value for key, value in line.items() if key in kept or key.startswith("time/")}


def _compared(this: Steps, other: Steps) -> dict[str, Any]:
    """Return medians and ratios. core_ratio: of sums, which other work on the cores moves least."""
    both = medians(this), medians(other)
    core = [
        sum(step["core_seconds"] for step in steps) / sum(step["response_tokens"] for step in steps)
        for steps in (this, other)
    ]
    ratio = both[0]["tokens_per_second"] / both[1]["tokens_per_second"]
    return {"this": both[0], "other": both[1], "ratio": ratio, "core_ratio": core[0] / core[1]}
