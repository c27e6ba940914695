"""`megatron-r1 why` on runs with a planted fault, and on healthy ones: does it name the fault?

Each case is a real run of the shipped command, in a copy of the packages with the case's change of
the source (tools/bench/why/faults.yaml), then `megatron-r1 why RUN` of the tree as it is. A fault
is named where `why` names the right quantity first, with its cause. The same command goes on with
the cases that have no result in --folder; a part takes less than 150 minutes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from megatron_r1.base.files import atomic_write
from tools.bench.host import ROOT
from tools.bench.why import examination, runs
from tools.bench.why.cases import WhyCase, read_table
from tools.bench.why.table import as_lines, as_page, between_markers, summary, verdict

PART_SECONDS = 140 * 60.0
"""After which no further case of a part begins."""
PAGE, SUMMARY = Path("docs/benchmarks/why.txt"), Path("docs/why.md")
"""The table, and the page that has its figures between markers."""


def add_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the bench to a parser."""
    options.add_argument("--folder", type=Path, default=Path("runs/bench_why"))
    options.add_argument("--seeds", default="0,1,2", help="such as 0,1,2; healthy runs: the first")
    options.add_argument("--part", default="1/1", metavar="K/N", help="every N-th case, from the K")
    options.add_argument("--only", action="append", metavar="TEXT", help="part of a case's name")
    options.add_argument("--keep", action="store_true", help="keep the runs' folders")
    options.add_argument("--again", action="store_true", help="examine runs that were kept again")
    options.add_argument("--table", action="store_true", help="no run: the table of the results")
    options.add_argument("--page", action="store_true", help=f"also write {PAGE} and {SUMMARY}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the result of every case that has one, those of earlier calls in this folder included.

    Args:
        args: the options of `add_options`."""
    case_table = read_table()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    folder = args.folder.resolve()
    seeded_cases = [
        (case, seed)
        for seed in seeds
        for case in sorted(case_table.cases, key=lambda each: each.is_healthy)
        if seed == seeds[0] or not case.is_healthy
        if not args.only or any(text in case.name for text in args.only)
    ]
    if not args.table:
        part, parts = (int(number) for number in args.part.split("/"))
        _make_missing_cases(seeded_cases[part - 1 :: parts], case_table.common, folder, args)
    results = []
    for case, seed in seeded_cases:
        path = _result_of(folder, case, seed)
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            results.append({**result, "verdict": verdict(case, result), "healthy": case.is_healthy})
    print(as_lines(results))
    print(summary(results))
    if args.page:
        atomic_write(ROOT / PAGE, as_page(results, seeds))
        page = (ROOT / SUMMARY).read_text(encoding="utf-8")
        atomic_write(ROOT / SUMMARY, between_markers(page, results))
    return {"cases": results}


def _result_of(folder: Path, case: WhyCase, seed: int) -> Path:
    return folder / "results" / f"{_name_to_slug(case.name)}-{seed}.json"


def _name_to_slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def _make_missing_cases(
    seeded_cases: list[tuple[WhyCase, int]],
    common: dict[str, Any],
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Make the cases that have no result, one after the other."""
    start = time.monotonic()
    (folder / "results").mkdir(parents=True, exist_ok=True)
    examination.prepare()
    for case, seed in seeded_cases:
        target = _result_of(folder, case, seed)
        place = folder / "runs" / target.stem
        if target.is_file() and not (args.again and (place / "run").is_dir()):
            continue
        if time.monotonic() - start > PART_SECONDS:
            print("the time of a part is over; the same command goes on")
            return
        result = _make_case(case, seed, common, folder, place, args)
        atomic_write(target, json.dumps(result, indent=1))
        print(
            f"{verdict(case, result):12} {result['seconds']:5.0f} s  {case.name}, seed {seed}",
            flush=True,
        )
        if not args.keep:
            shutil.rmtree(place, ignore_errors=True)


def _make_case(
    case: WhyCase,
    seed: int,
    common: dict[str, Any],
    folder: Path,
    place: Path,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Make one case and return its result."""
    start = time.monotonic()
    result: dict[str, Any] = {"case": case.name, "seed": seed}
    outcome_file = place / "made.json"
    is_made = args.again and outcome_file.is_file()
    if is_made:
        outcome = json.loads(outcome_file.read_text(encoding="utf-8"))
        place_of_run = place / "run"
    else:
        try:
            run_result, place_of_run = runs.run_case(case, common, seed, folder, place)
            outcome = run_result._asdict()
        except (RuntimeError, ValueError) as error:
            outcome = {"status": -1, "seconds": 0.0, "error": str(error)}
            place_of_run = place / "run"
        place.mkdir(parents=True, exist_ok=True)
        outcome_file.write_text(json.dumps(outcome), encoding="utf-8")
    result["run"] = outcome
    if outcome["status"] == 0:
        result["why"] = examination.examine(place_of_run, place / "why.txt")
        lines = (place_of_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        result["step_seconds"] = [json.loads(line)["time/step"] for line in lines]
    result["seconds"] = time.monotonic() - start
    if is_made:
        result["seconds"] += outcome["seconds"]
    result["load"] = os.getloadavg()[0]
    return result
