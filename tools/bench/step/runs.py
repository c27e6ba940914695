"""The runs of a comparison, which take turns, so that other load on the machine affects each.

Every run is written down when it has ended, with the most memory that its processes hold together,
so that the same command continues after a stop."""

import argparse
import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.base.processes.host_memory import PeakMemory
from tools.bench import host
from tools.bench.step.cases import StepCase, make_case
from tools.bench.step.figures import Runs


def measure(args: argparse.Namespace, about: dict[str, Any]) -> Runs:
    """Make the runs that are missing in the file `args.runs`, and return all; after Ctrl-C those
    that have ended.

    Args:
        args: the command's options.
        about: what runs of one comparison have in common."""
    records = list(read_lines(args.runs)) if args.runs.exists() else []
    if records and records[0] != about:
        raise SystemExit(
            f"{args.runs}: its runs are of {records[0]}, these would be of {about}; delete it, "
            "or name another file with --runs"
        )
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    if not records:
        _append_record(args.runs, about)
    runs: Runs = defaultdict(list)
    for record in records[1:]:
        runs[record["case"], record["system"]].append(record)
    with tempfile.TemporaryDirectory() as name:
        cases = {case_name: make_case(case_name, Path(name), args) for case_name in args.cases}
        missing = [
            (case_name, system)
            for turn in range(args.repeats)
            for case_name, case in cases.items()
            for system in case.systems
            if len(runs[case_name, system]) <= turn
        ]
        try:
            for number, (case_name, system) in enumerate(missing):
                record = _run_case(
                    case_name, system, cases[case_name], Path(name) / f"{number}", args
                )
                _append_record(args.runs, record)
                runs[case_name, system].append(record)
        except KeyboardInterrupt:
            print(f"stopped; the same command continues: finished runs are in {args.runs}")
    return runs


def _run_case(
    name: str, system: str, case: StepCase, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    load, worth = os.getloadavg()[0], host.cores_worth()
    with PeakMemory(every_seconds=1.0) as peak:
        steps = case.run(system, folder, args.peer_python)
    seconds = ", ".join(f"{step['seconds']:.2f}" for step in steps)
    print(
        f"{name}, {system}: {seconds} s a step, {peak.gib:.1f} GiB; before it load {load:.1f}, "
        f"{host.num_cores()} cores worth {worth:.1f}",
        flush=True,
    )
    return {
        **{"case": name, "system": system, "load": load, "worth": worth, "gib": peak.gib},
        "steps": steps,
    }


def _append_record(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
