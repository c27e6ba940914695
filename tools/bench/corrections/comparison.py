"""Which correction when: the settings of controller/corrections compared with each other, with the
same seeds, where engine and trainer differ by themselves and where that is planted.

Reported for each cell: held-out accuracy at the end, steps to 80%, runs that collapsed, with 95%
intervals, and the difference from the part's first cell, paired by seed. The task is the demo's
(examples/laptop) with models and rollouts so small that a run takes 20 to 40 CPU seconds.

A run's figures are a file in --folder, written when it has ended. The same command makes the runs
that are missing; a call without missing ones only prints. A study goes on elsewhere with --results,
the figures that an earlier call wrote to --json: all finished runs, also of cells with too few
seeds for the tables."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tools.bench import host
from tools.bench.algorithms import PACKAGES
from tools.bench.corrections.cells import PARTS
from tools.bench.corrections.figures import Runs, as_page, tables
from tools.bench.corrections.runs import Study, provenance, share_settings, spread_settings

FEWEST = 10
"""Seeds that a cell needs to be in the tables."""


def add_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--folder", type=Path, default=Path("runs/corrections"))
    options.add_argument("--part", action="append", choices=list(PARTS), help="repeatable")
    options.add_argument("--cell", action="append", help="such as sequence; repeatable")
    options.add_argument("--seeds", default="0-9", help="such as 0-9 or 3,5")
    options.add_argument("--minutes", type=float, help="begin no run after so many")
    options.add_argument("--show", action="store_true", help="make no runs")
    options.add_argument(
        "--fewest", type=int, default=FEWEST, help="seeds of a cell in tables; fewer: left out"
    )
    options.add_argument("--results", type=Path, help="take over the runs of this earlier --json")
    options.add_argument("--page", type=Path, help="also write the figures here, for people")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every finished run in the folder, those of earlier calls included.

    Raises:
        SystemExit: a run fails or is stopped; the same command continues.
    """
    study = Study(args.folder)
    if args.results:
        earlier_runs = json.loads(args.results.read_text(encoding="utf-8"))["runs"]
        study.take_over(spread_settings(earlier_runs))
    if not args.show:
        _make_missing(study, args)
    runs = read_runs(study)
    table_runs = shown_runs(runs, args.fewest)
    print(tables(table_runs))
    finished_runs = [
        run for cells in runs.values() for seeds in cells.values() for run in seeds.values()
    ]
    hours = sum(run["core_seconds"] for run in finished_runs) / 3600
    print(f"{len(finished_runs)} runs, {hours:.1f} core hours")
    packages = host.versions(PACKAGES)
    if args.page:
        args.page.write_text(as_page(table_runs, packages, host.num_cores()), encoding="utf-8")
    return {"packages": packages, **provenance(), "runs": share_settings(runs)}


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `0-9` or `3,5`, in order.

    Raises:
        SystemExit: the text is of no such form."""
    try:
        seeds: list[int] = []
        for word in text.split(","):
            first, _, last = word.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = []
    if not seeds:
        raise SystemExit(f"--seeds {text}: give numbers such as 0-9 or 3,5")
    return seeds


def read_runs(study: Study) -> Runs:
    """Return the figures of all finished runs of the present cells."""
    runs: Runs = {}
    for part, settings in PARTS.items():
        for cell in settings.cells:
            files = sorted(study.file(part, cell, 0).parent.glob("*.json"))
            seeds = sorted(int(file.stem) for file in files)
            finished = {
                str(seed): json.loads(study.file(part, cell, seed).read_text(encoding="utf-8"))
                for seed in seeds
                if study.is_done(part, cell, seed)
            }
            if finished:
                runs.setdefault(part, {})[cell] = finished
    return runs


def shown_runs(runs: Runs, fewest: int) -> Runs:
    """Return the cells with at least `fewest` seeds, of parts whose first cell has them and others
    do."""
    with_enough = {
        part: {cell: seeds for cell, seeds in cells.items() if len(seeds) >= fewest}
        for part, cells in runs.items()
    }
    return {
        part: cells
        for part, cells in with_enough.items()
        if len(cells) > 1 and next(iter(PARTS[part].cells)) in cells
    }


def _make_missing(study: Study, args: argparse.Namespace) -> None:
    """Make the runs that are missing, part by part, and in a part seed by seed: a call that ends
    early leaves pairs."""
    start, parts = time.monotonic(), args.part or list(PARTS)
    study.folder.mkdir(parents=True, exist_ok=True)
    seeds, cells = parse_seeds(args.seeds), {cell for part in parts for cell in PARTS[part].cells}
    if unknown := set(args.cell or ()) - cells:
        raise SystemExit(f"--cell {', '.join(unknown)}: there are {', '.join(sorted(cells))}")
    missing_runs = [
        (part, cell, seed)
        for part in parts
        for seed in seeds
        for cell in PARTS[part].cells
        if (args.cell is None or cell in args.cell) and not study.is_done(part, cell, seed)
    ]
    total_seconds = 0.0
    for index, (part, cell, seed) in enumerate(missing_runs, 1):
        minutes = (time.monotonic() - start) / 60
        if args.minutes is not None and minutes > args.minutes:
            print(f"{len(missing_runs) - index + 1} runs are left after {minutes:.0f} minutes")
            break
        total_seconds += (seconds := study.make(part, cell, seed))
        print(
            f"{index} of {len(missing_runs)}: {part}, {cell}, seed {seed}: "
            f"{seconds:.0f} CPU seconds, {total_seconds / 60:.0f} minutes of them in all",
            flush=True,
        )
