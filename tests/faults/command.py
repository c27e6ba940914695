"""`python tests/faults`: plants each fault of tests/faults/mutations.yaml in a copy of the tree and
reports which of them the tests of `make test` catch.

mutmut and cosmic-ray generate every change that their operators make of a file, and know it by a
number or a position; neither applies a chosen table of faults by symbol, in which a missing fsync
or a swapped axis can stand, so this does.

A fault is kept by symbol and text, not by file and line: it is looked for in every file of its
package, and must be found exactly once. The covering tests of each fault run without it, too, in
copies of the source tree. Results are kept in build/faults.jsonl, so that an interrupted run goes
on; a fault runs again after its entry, file or tests have changed. Status 1: a fault survives
without a written reason, or a test fails without a fault."""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from megatron_r1.base.files.json_lines import append_lines, read_lines

TABLE = Path("tests/faults/mutations.yaml")
FOLDERS = {
    "bench": "tools/bench",
    "grading": "grading/r1_grading",
    "kernels": "kernels/r1_kernels",
    "examples": "examples",
}
"""Packages outside of megatron_r1; every other one is a package of it."""


@dataclass(frozen=True)
class Mutation:
    """One entry of the table.

    Attributes:
        package: one of megatron_r1, or a name in `FOLDERS`.
        symbol: qualified name of a function, class or variable within its module.
        replace: text that is found once in the symbol's source.
        by: the text in its place.
        fault: what is then wrong.
        tests: `file.py` or `file.py::test`.
        survives: why no test can catch it, or None."""

    package: str
    symbol: str
    replace: str
    by: str
    fault: str
    tests: tuple[str, ...]
    survives: str | None = None

    @property
    def name(self) -> str:
        return f"{self.package}: {self.symbol}: {self.replace!r} -> {self.by!r}"


@dataclass(frozen=True)
class Mutant:
    """A mutation in a source tree: the file, relative to the tree's root, before and after."""

    mutation: Mutation
    path: Path
    before: str
    after: str


def read_table(root: Path) -> list[Mutation]:
    """Return the entries of the table in order. Raises TypeError for an unknown or missing key."""
    table = yaml.safe_load((root / TABLE).read_text(encoding="utf-8"))
    return [
        Mutation(package, **(entry | {"tests": tuple(entry["tests"])}))
        for package, entries in table.items()
        for entry in entries
    ]


def packages(root: Path) -> list[str]:
    """Return the names of all packages: those of megatron_r1, and `FOLDERS`."""
    own = (root / "megatron_r1").glob("*/__init__.py")
    return sorted([*(path.parent.name for path in own), *FOLDERS])


def plant(mutation: Mutation, root: Path) -> Mutant:
    """Return the mutated file. Raises ValueError, naming the entry, where the text is not found
    exactly once within the symbol, or the result is no Python or means the same."""
    found = list(_places(mutation, root))
    if len(found) != 1:
        where = ", ".join(
            f"{path}:{before.count(chr(10), 0, at) + 1}" for path, before, at in found
        )
        raise ValueError(f"{mutation.name}: found {len(found)} times ({where or 'nowhere'})")
    [(path, before, start)] = found
    after = before[:start] + mutation.by + before[start + len(mutation.replace) :]
    try:
        is_same = ast.dump(ast.parse(after)) == ast.dump(ast.parse(before))
        compile(after, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ValueError(f"{mutation.name}: the result does not compile: {error}") from error
    if is_same:
        raise ValueError(f"{mutation.name}: the result means the same")
    return Mutant(mutation, path, before, after)


def covering_tests(mutation: Mutation, root: Path) -> list[tuple[Path, str]]:
    """Return the covering tests: file, relative to the root, and node within it or "". Raises
    ValueError, naming the entry, for a file that is not found exactly once, or lacks the test."""
    found = []
    for test in mutation.tests:
        file, _, node = test.partition("::")
        paths = _tests_by_name(root).get(file, [])
        if len(paths) != 1:
            raise ValueError(f"{mutation.name}: {len(paths)} files of tests are named {file}")
        name = node.partition("[")[0].rpartition("::")[2]
        if name and f"def {name}(" not in (root / paths[0]).read_text(encoding="utf-8"):
            raise ValueError(f"{mutation.name}: {paths[0]} has no test {name}")
        found.append((paths[0], node))
    return found


def digest(*texts: str) -> str:
    """Return a key of the texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()[:24]


def _places(mutation: Mutation, root: Path) -> Iterator[tuple[Path, str, int]]:
    """Yield (file, its text, offset) of every place that the entry describes."""
    for path, text in _sources(root, mutation.package):
        if mutation.replace not in text:
            continue
        for start, end in _spans(text).get(mutation.symbol, ()):
            at = text.find(mutation.replace, start, end)
            while at >= 0:
                yield path, text, at
                at = text.find(mutation.replace, at + 1, end)


@cache
def _sources(root: Path, package: str) -> list[tuple[Path, str]]:
    base = root / FOLDERS.get(package, f"megatron_r1/{package}")
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    return [(file.relative_to(root), file.read_text(encoding="utf-8")) for file in files]


@cache
def _tests_by_name(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        found.setdefault(path.name, []).append(path.relative_to(root))
    return found


@cache
def _spans(text: str) -> dict[str, list[tuple[int, int]]]:
    """Return qualified name -> spans of the definitions of a module, as offsets in `text`."""
    lines = [0]
    for line in text.split("\n"):
        lines.append(lines[-1] + len(line) + 1)
    found: dict[str, list[tuple[int, int]]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names, first = [node.name], min([node, *node.decorator_list], key=_line).lineno
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                first = node.lineno
            else:
                continue
            for name in names:
                span = lines[first - 1], lines[node.end_lineno or first]
                found.setdefault(prefix + name, []).append(span)

    visit(ast.parse(text).body, "")
    return found


def _line(node: ast.stmt | ast.expr) -> int:
    return node.lineno


CPU_SECONDS = 120
"""Of one process with a fault: more than the tests of any fault take. An endless loop ends here; a
test that waits for ever is ended by the watchdog of tests/conftest.py."""
IDLE_SECONDS = 60
"""After which that watchdog takes a test that does nothing for a hanging one."""
CHECK = (
    "import megatron_r1, r1_grading, r1_kernels\n"
    "for package in (megatron_r1, r1_grading, r1_kernels): print(package.__file__)"
)
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not more and not slow")
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
NO_TEST_RAN = 5  # pytest's exit status


class TreeCopy:
    """A copy of the files that git knows or would add, in a folder that `close` deletes.

    Raises RuntimeError where Python, started there, imports other files than the copy's."""

    def __init__(self, root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.check_output(listing, cwd=root, text=True)
        for name in filter(None, listed.split("\0")):
            if (root / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.folder / name)
        path = os.pathsep.join([str(self.folder / part) for part in ("", "kernels", "grading")])
        self._environment = os.environ | {
            "PYTHONPATH": path,
            "OMP_WAIT_POLICY": "passive",
            "R1_TEST_IDLE_SECONDS": str(IDLE_SECONDS),
        }
        imported = subprocess.check_output(
            [sys.executable, "-c", CHECK], cwd=self.folder, env=self._environment, text=True
        )
        for file in imported.splitlines():
            if self.folder not in Path(file).parents:
                raise RuntimeError(f"the copy in {self.folder} imports {file}")

    def close(self) -> None:
        """Delete the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, path: Path, text: str) -> None:
        """Replace a file of the copy, and delete its compiled form: Python compares only size and
        second."""
        file = self.folder / path
        file.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(file)).unlink(missing_ok=True)

    def run(self, tests: list[str], limit: str = "unlimited") -> tuple[int, str]:
        """Run tests up to the first failure; return pytest's exit status and its output. limit: CPU
        seconds of each process."""
        limited = ["sh", "-c", f'ulimit -S -t {limit}; exec "$@"', "sh", sys.executable]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [*limited, *PYTEST, *tests],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = process.wait()
            with contextlib.suppress(ProcessLookupError):  # what a failed test has left
                os.killpg(process.pid, signal.SIGKILL)
            log.seek(0)
            return status, log.read()


def failure_of(status: int, output: str) -> str | None:
    """Return the first test that failed, or how else pytest ended; None where all passed."""
    if status == 0:
        return None
    if status == NO_TEST_RAN:
        return "none of them is in make test"
    first = FIRST_FAILURE.search(output)
    return first[1] if first else f"pytest ended with {status}: {output.strip()[-200:]!r}"


ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("build/faults.jsonl")


class Outcome(NamedTuple):
    """Result of a fault.

    Attributes:
        caught_by: the first test that failed, or None.
        fails_anyway: a covering test that fails without the fault, too, which then was not planted.
    """

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
        prog="tests/faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="part of `package: symbol: 'replace' -> 'by'`"
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
        file, separator, test = outcome.caught_by.partition("::")
        end = Path(file).name + separator + test
    else:
        end = f"SURVIVED: {mutation.survives}" if mutation.survives else "SURVIVED"
    return f"{mutation.package:14} {mutation.symbol:34} {mutation.fault:62} {end}"
