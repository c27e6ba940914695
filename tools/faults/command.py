"""`python tools/faults`: plants each fault of tests/faults/mutations.yaml in a copy of the tree and
reports which of them the tests of `make test` catch.

mutmut and cosmic-ray generate every change that their operators make of a file, and know it by a
number or a position; neither applies a chosen table of faults by symbol, in which a missing fsync
or a swapped axis can stand, so this does.

First the covering tests run without a fault. Results are kept in build/faults.jsonl, so that an
interrupted run goes on; a fault runs again after its entry, its file or its tests have changed.
Status 1: a fault survives without a written reason, or a test fails without a fault."""

from __future__ import annotations

import argparse
import os
import queue
import sys
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_r1.files.jsonl import append_lines, read_lines
from tools.faults.copies import CPU_SECONDS, TreeCopy, failure_of
from tools.faults.mutations import Mutant, Mutation, covering_tests, digest, plant, read_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("build/faults.jsonl")


def main() -> int:
    """Run the faults that have no result yet; print the table and return the exit status."""
    chosen = _arguments()
    table = [each for each in read_table(ROOT) if chosen.only in each.name]
    try:
        mutants = {_key(mutant): mutant for mutant in (plant(each, ROOT) for each in table)}
    except ValueError as error:
        sys.exit(str(error))
    results = ROOT / RESULTS
    results.parent.mkdir(exist_ok=True)
    caught_by = {line["key"]: line["caught_by"] for line in read_lines(results)}
    waiting = {key: mutant for key, mutant in mutants.items() if key not in caught_by}
    if waiting:
        print(f"{len(mutants)} faults, of which {len(waiting)} have no result yet", flush=True)
        for key, test in _run_all(waiting, min(chosen.jobs, len(waiting))):
            mutation = mutants[key].mutation
            append_lines(results, [{"key": key, "fault": mutation.name, "caught_by": test}])
            caught_by[key] = test
            print(_row(mutation, test), flush=True)
        print()
    for key, mutant in mutants.items():
        print(_row(mutant.mutation, caught_by[key]))
    survivors = [mutant.mutation for key, mutant in mutants.items() if caught_by[key] is None]
    num_caught = len(mutants) - len(survivors)
    print(f"{num_caught} of {len(mutants)} caught ({num_caught / max(1, len(mutants)):.0%})")
    return int(any(mutation.survives is None for mutation in survivors))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="part of `room: symbol: 'replace' -> 'by'`"
    )
    return parser.parse_args()


def _key(mutant: Mutant) -> str:
    """Return a key of the entry, the file that it changes, and the files of its tests."""
    mutation = mutant.mutation
    tests = [
        (ROOT / path).read_text(encoding="utf-8") for path, _ in covering_tests(mutation, ROOT)
    ]
    return digest(mutant.before, mutant.after, *mutation.tests, *tests)


def _run_all(waiting: dict[str, Mutant], jobs: int) -> Iterator[tuple[str, str | None]]:
    """Yield (key, what caught it or None) of each mutant when it is known, `jobs` at a time."""
    copies: list[TreeCopy] = []
    try:
        copies += [TreeCopy(ROOT) for _ in range(jobs)]
        _check_unchanged(copies, waiting.values())
        idle: queue.SimpleQueue[TreeCopy] = queue.SimpleQueue()
        for copy in copies:
            idle.put(copy)
        done: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()

        def run(key: str, mutant: Mutant) -> None:
            copy = idle.get()
            done.put((key, _run_one(copy, mutant)))
            idle.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for item in waiting.items():
                    pool.submit(run, *item)
                for _ in waiting:
                    yield done.get()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        for copy in copies:
            copy.close()


def _check_unchanged(copies: list[TreeCopy], mutants: Collection[Mutant]) -> None:
    """Run the covering tests without a fault, divided among the copies; exit where one fails."""
    nodes = sorted({node for mutant in mutants for node in _nodes(mutant.mutation)})
    shares = [nodes[index :: len(copies)] for index in range(len(copies))]
    with ThreadPoolExecutor(len(copies)) as pool:
        for status, output in pool.map(TreeCopy.run, copies, shares):
            if failure := failure_of(status, output):
                sys.exit(f"{output}\nwithout a fault: {failure}")


def _run_one(copy: TreeCopy, mutant: Mutant) -> str | None:
    copy.write(mutant.path, mutant.after)
    try:
        return failure_of(*copy.run(_nodes(mutant.mutation), str(CPU_SECONDS)))
    finally:
        copy.write(mutant.path, mutant.before)


def _nodes(mutation: Mutation) -> list[str]:
    found = covering_tests(mutation, ROOT)
    return [f"{path}::{node}" if node else str(path) for path, node in found]


def _row(mutation: Mutation, caught_by: str | None) -> str:
    end = caught_by.rpartition("/")[2] if caught_by else "SURVIVED"
    if not caught_by and mutation.survives:
        end += f": {mutation.survives}"
    return f"{mutation.room:14} {mutation.symbol:34} {mutation.fault:62} {end}"
