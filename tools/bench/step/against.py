"""Whole steps of this checkout beside another one's: the same work, runs in turn."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from tools.bench import machine
from tools.bench.step.figures import Steps, compared
from tools.bench.step.model import Tail, write_model
from tools.bench.step.systems import run_ours
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
                    lines = run_ours(work, model, questions, place, chosen.steps, more, root)
                    steps[name][side] += map(_timings, lines)
                    seconds = ", ".join(f"{line['seconds']:.2f}" for line in lines)
                    print(f"{name}, {side}: {seconds} s a step", flush=True)
    comparisons = {}
    for name, sides in steps.items():
        comparisons[name] = comparison = compared(**sides)
        # Of sums, which other work on the cores moves least.
        this, other = (
            sum(step["core_seconds"] for step in lines)
            / sum(step["response_tokens"] for step in lines)
            for lines in sides.values()
        )
        comparison["core_ratio"] = this / other
        print(
            f"{name}: this has {comparison['ratio']:.3f} x the tokens/s of the other, and takes "
            f"{comparison['core_ratio']:.3f} x its processor time a token"
        )
    return {"conditions": conditions, "comparisons": comparisons, "steps": steps}


def _timings(line: dict[str, Any]) -> dict[str, Any]:
    kept = ("seconds", "core_seconds", "response_tokens")
    return {key: value for key, value in line.items() if key in kept or key.startswith("time/")}
