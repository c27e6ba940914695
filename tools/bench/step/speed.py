"""Whole RL steps and those of TRL's GRPOTrainer: the same model folder, questions, limits, cores.

megatron-r1 runs as a user runs it, TRL in a process of its own; the runs alternate, so that other
load on the machine affects both. Tokens per second are response tokens over the wall-clock time of
whole steps. The first step of a run includes warming up and is left out. A second comparison, of
megatron-r1 alone, divides the time of a step with overlapped rollouts by that of its slower part.
Finished runs are kept in --runs, and the same command continues with those that are missing.

--model compares a pretrained model, whose responses are short, and --limit adds responses with a
long tail. --profile, --recipe and --against compare nothing with TRL (`other_modes`)."""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_r1.base.processes import timeline
from tools.bench import host
from tools.bench.small_models import TOKENIZER
from tools.bench.step.cases import CASES, OVERLAP, PRETRAINED, SETTINGS, WORKS
from tools.bench.step.figures import Runs, compare_runs, overlap_ratio, steps_of
from tools.bench.step.other_modes import compare_checkouts, profile_step, time_phases
from tools.bench.step.page import as_page, summary, table
from tools.bench.step.pretrained import run_pretrained
from tools.bench.step.runs import measure
from tools.bench.step.systems import PACKAGES, PEERS, trl_version


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
        return profile_step(args)
    if args.recipe:
        args.model = args.model or str(TOKENIZER)
        return time_phases(args)
    if args.against:
        runs = {name: (work, SETTINGS["ours"]) for name, work in WORKS.items()}
        runs["long tail, overlapped"] = WORKS["long tail"], SETTINGS["overlapped"]
        return {"packages": host.versions(PACKAGES), **compare_checkouts(args, runs)}
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
