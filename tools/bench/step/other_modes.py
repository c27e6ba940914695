"""What `python tools/bench step` does instead of comparing with TRL: it profiles a step, times the
phases of a recipe, or compares with another checkout of this repository."""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.base.processes import timeline
from tools.bench import host
from tools.bench.host import megatron_r1, run_to_end
from tools.bench.small_models import TOKENIZER
from tools.bench.step import critical_path
from tools.bench.step.cases import SPEED_SETTINGS, WORKS
from tools.bench.step.figures import Steps, compare_systems
from tools.bench.step.systems import PACKAGES, run_ours
from tools.bench.step.work import StepWork, Tail, write_model, write_questions

PHASES = ("time/rollout", "time/reward", "time/train", "time/push", "time/step")
SHOWN_METRICS = (
    "tokens_per_second",
    "response_length/mean",
    "logprob_diff/mean",
    "logprob_diff/max",
)


def _write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a model folder and questions; return both."""
    questions = write_questions(folder / "questions.jsonl", 256)
    return write_model(folder / "model", Tail()), questions


def compare_checkouts(
    args: argparse.Namespace, runs: dict[str, tuple[StepWork, dict[str, dict[str, Any]]]]
) -> dict[str, Any]:
    """Run this checkout and another one, in turns.

    Returns, for each of `runs` (name: work and settings), medians of both checkouts, ratios of
    their tokens per second and of their processor time a token, and every step."""
    steps: dict[str, dict[str, Steps]] = {name: {"this": [], "other": []} for name in runs}
    conditions = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = _write_inputs(Path(folder))
        for turn in range(args.repeats):
            for name, (work, settings) in runs.items():
                for side, root in (("other", args.against), ("this", None)):
                    conditions.append((os.getloadavg()[0], host.cores_worth()))
                    place = Path(folder) / f"{turn} {name} {side}"
                    lines = run_ours(work, *inputs, place, args.steps, settings, root)
                    steps[name][side] += map(_select_timings, lines)
                    seconds = ", ".join(f"{line['seconds']:.2f}" for line in lines)
                    print(f"{name}, {side}: {seconds} s a step", flush=True)
    comparisons = {}
    for name, sides in steps.items():
        comparisons[name] = comparison = compare_systems(**sides)
        # Of sums, which other work on the cores moves least.
        own_cost, peer_cost = (
            sum(step["core_seconds"] for step in lines)
            / sum(step["response_tokens"] for step in lines)
            for lines in sides.values()
        )
        comparison["core_ratio"] = own_cost / peer_cost
        print(
            f"{name}: this has {comparison['ratio']:.3f} x the tokens/s of the other, and takes "
            f"{comparison['core_ratio']:.3f} x its processor time a token"
        )
    return {"conditions": conditions, "comparisons": comparisons, "steps": steps}


def _select_timings(line: dict[str, Any]) -> dict[str, Any]:
    fields = ("seconds", "core_seconds", "response_tokens")
    return {key: value for key, value in line.items() if key in fields or key.startswith("time/")}


def profile_step(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return where the time of a step goes (`tools.bench.step.critical_path`)."""
    if args.profile:
        profile = critical_path.profile(Path(args.profile))
    else:
        with tempfile.TemporaryDirectory() as name:
            os.environ[timeline.FOLDER_VARIABLE] = f"{name}/timeline"
            if args.recipe:
                args.model = args.model or str(TOKENIZER)
                time_phases(args)
            else:
                inputs = _write_inputs(Path(name))
                run_ours(WORKS["short"], *inputs, Path(name, "run"), args.steps, SPEED_SETTINGS)
            profile = critical_path.profile(Path(name, "timeline"))
    print(critical_path.table(profile))
    return {"packages": host.versions(PACKAGES), "profile": profile}


def time_phases(args: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe for a few steps; return medians over those after the first, by metric name.

    If the given model folder has no weights, random ones of its shape are used (their responses are
    long and wrong: a worst case)."""
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if not list(Path(model).glob("*.safetensors")):
            model = _random_model(args.model, Path(folder))
        settings = {
            "run.folder": f"{folder}/rl",
            "run.steps": args.steps + 1,
            "model.path": model,
            "data.num_heldout": 0,
        }
        run_to_end(megatron_r1("rl", args.recipe, settings))
        lines = list(read_lines(Path(folder, "rl/metrics.jsonl")))[1:]
    medians = {name: median(line[name] for line in lines) for name in (*PHASES, *SHOWN_METRICS)}
    print(f"median of {len(lines)} steps of {args.recipe} on {host.num_cores()} cores")
    for name, value in medians.items():
        fraction = f"{value / medians['time/step']:6.1%}" if name in PHASES else ""
        print(f"  {name:24} {value:12.4g}  {fraction}")
    return {"steps": len(lines), "recipe": Path(args.recipe).name, "medians": medians}


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
