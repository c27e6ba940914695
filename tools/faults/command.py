"""`python tools/faults`: plants each fault of tests/faults/mutations.yaml in a copy of the tree and
reports which of them the tests of `make test` catch.

mutmut and cosmic-ray generate every change that their operators make of a file, and know it by a
number or a position; neither applies a chosen table of faults by symbol, in which a missing fsync
or a swapped axis can stand, so this does.

The covering tests of each fault run without it, too. Results are kept in build/faults.jsonl, so
that an interrupted run goes on; a fault runs again after its entry, file or tests have changed.
Status 1: a fault survives without a written reason, or a test fails without a fault."""

from __future__ import annotations

import argparse
import os
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megatron_r1.base.files.jsonl import append_lines, read_lines
from tools.faults.copies import CPU_SECONDS, TreeCopy, failure_of
from tools.faults.mutations import Mutant, Mutation, covering_tests, digest, plant, read_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("build/faults.jsonl")


class Outcome(NamedTuple):
    """Result of a fault. caught_by: the first test that failed, or None. fails_anyway: a covering
    test that fails without the fault, too, which then was not planted."""

    caught_by: str | None = None
    fails_anyway: str | None = None


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
    outcomes = {line["key"]: Outcome(line["caught_by"]) for line in read_lines(results)}
    waiting = {key: mutant for key, mutant in mutants.items() if key not in outcomes}
    if waiting:
        print(f"{len(mutants)} faults, of which {len(waiting)} have no result yet", flush=True)
        for key, outcome in _run_all(waiting, min(chosen.jobs, len(waiting))):
            mutation, outcomes[key] = mutants[key].mutation, outcome
            if outcome.fails_anyway is None:
                line = {"key": key, "fault": mutation.name, "caught_by": outcome.caught_by}
                append_lines(results, [line])
            print(_row(mutation, outcome), flush=True)
        print()
    rows = [(mutant.mutation, outcomes[key]) for key, mutant in mutants.items()]
    for row in rows:
        print(_row(*row))
    caught = sum(outcome.caught_by is not None for _, outcome in rows)
    print(f"{caught} of {len(rows)} caught ({caught / max(1, len(rows)):.0%})")
    return int(any(not (o.caught_by or (m.survives and not o.fails_anyway)) for m, o in rows))


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


def _run_all(waiting: dict[str, Mutant], jobs: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the key and the outcome of each mutant when it is known, `jobs` at a time."""
    copies: list[TreeCopy] = []
    done: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
    idle: queue.SimpleQueue[TreeCopy] = queue.SimpleQueue()
    failures: dict[tuple[str, ...], str | None] = {}

    def run(key: str, mutant: Mutant) -> None:
        copy = idle.get()
        done.put((key, _run_one(copy, mutant, failures)))
        idle.put(copy)

    try:
        for _ in range(jobs):
            copies.append(TreeCopy(ROOT))
            idle.put(copies[-1])
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


def _run_one(
    copy: TreeCopy, mutant: Mutant, failures: dict[tuple[str, ...], str | None]
) -> Outcome:
    """Run a mutant's tests without and with the fault. failures: of tests without a fault, as far
    as they are known; what is found out is added."""
    tests = mutant.mutation.tests
    nodes = _nodes(mutant.mutation)
    if tests not in failures:
        failures[tests] = failure_of(*copy.run(nodes))
    if failure := failures[tests]:
        return Outcome(fails_anyway=failure)
    copy.write(mutant.path, mutant.after)
    try:
        return Outcome(failure_of(*copy.run(nodes, str(CPU_SECONDS))))
    finally:
        copy.write(mutant.path, mutant.before)


def _nodes(mutation: Mutation) -> list[str]:
    found = covering_tests(mutation, ROOT)
    return [f"{path}::{node}" if node else str(path) for path, node in found]


def _row(mutation: Mutation, outcome: Outcome) -> str:
    if outcome.fails_anyway:
        end = f"NOT PLANTED, its tests fail: {outcome.fails_anyway}"
    elif outcome.caught_by:
        end = outcome.caught_by.rpartition("/")[2]
    else:
        end = f"SURVIVED: {mutation.survives}" if mutation.survives else "SURVIVED"
    return f"{mutation.room:14} {mutation.symbol:34} {mutation.fault:62} {end}"
