"""Runs the tests on a null GPU and records how they ended; says whether the record is current.

    .venv-cuda/bin/python -m tools.cuda_record --run    as `make test-cuda` does
    python -m tools.cuda_record                         compares the record with the files it is of

The record, tests/nullgpu/passed.json, has for each file of tests the commit, the date and the
numbers of tests that passed and failed; opened.txt next to it has the repository's files that the
tests and all their processes opened (`tools.opened_files`), pages aside, each with a hash of its
bytes and the files of tests. Only tests whose record is old are run. They need 9 GB of packages, so
CI does not run them: one of its last lines names the files that have changed since."""

import argparse
import datetime
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.evidence.records import git_output, head
from tools.opened_files import run_traced

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("tests/nullgpu")
RECORD = FOLDER / "passed.json"
OPENED = FOLDER / "opened.txt"
LOCK = Path("requirements/cuda.lock")
"""The packages, which tests open in ignored folders."""
COUNTS = "R1_TEST_COUNTS"
"""Variable: the file that the tests' process writes its counts to."""
PAGES = (".md", RECORD.name, OPENED.name)
"""Ends of names of files that the record is not of."""
CACHED_MODULE = re.compile(r"__pycache__/([^/.]+)\.[^/]*\.pyc$")
Result = dict[str, Any]
_writing = threading.Lock()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write how many tests ended in each way: a hook of `pytest -p tools.cuda_record`."""
    counts = {way: len(reports) for way, reports in terminalreporter.stats.items()}
    Path(os.environ[COUNTS]).write_text(json.dumps(counts), encoding="utf-8")


def record_state(root: Path = ROOT) -> str:
    """Return a sentence that says whether the record is of the present files."""
    results, opened = _read(root)
    if not results:
        return "null GPU: no record of a run; run `make test-cuda`"
    run = ", ".join(
        f"{sum(r[way] for r in results.values())} {way}" for way in ("passed", "failed")
    )
    run += f" at {' '.join(sorted({result['commit'][:8] for result in results.values()}))}"
    changed = {reason for name in _tests(root) for reason in _changes(root, name, opened)}
    if changed:
        reasons = ", ".join(sorted(changed))
        return f"null GPU: the record is old ({run}): {reasons}; run `make test-cuda`"
    files = {file for hashes in opened.values() for file in hashes}
    return f"null GPU: the record is current: {run}, which opened {len(files)} files"


def sources(root: Path, opened: Iterable[str]) -> list[str]:
    """Return the names within the repository of the files that are its own, pages aside: for a
    cached module its source. What git ignores is not its own."""
    paths = {os.path.realpath(CACHED_MODULE.sub(r"\1.py", name)) for name in opened}
    own = git_output(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    inside = {os.path.relpath(path, root.resolve()) for path in paths}
    return sorted(name for name in inside & set(own.split("\0")) if not name.endswith(PAGES))


def run(arguments: list[str]) -> int:
    """Run the tests whose record is old or has failures, the longest first; return 1 if one failed.

    Each file's record is written when it ends. Nothing is recorded of code that is not committed,
    as the record names a commit, nor of a part of a file's tests."""
    results, opened = _read(ROOT)
    old = [n for n in _tests(ROOT) if _changes(ROOT, n, opened) or results[n]["failed"]]
    old.sort(key=lambda name: -results.get(name, {}).get("minutes", 0))
    with ThreadPoolExecutor(2) as pool:  # a file needs up to 12 GB
        codes = list(pool.map(lambda name: _run_file(name, arguments), old))
    print(record_state(ROOT))
    return int(any(codes))


def _run_file(name: str, arguments: list[str]) -> int:
    commit, start = head(ROOT), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts"
        pytest = [sys.executable, "-m", "pytest", "-p", "tools.cuda_record", f"{FOLDER}/{name}"]
        code, opened = run_traced(["env", f"{COUNTS}={path}", *pytest, *arguments])
        counts = Counter(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    names = sources(ROOT, {*opened, str(ROOT / LOCK)})
    uncommitted = git_output(ROOT, "status", "--porcelain", "--", *names) if commit else "no commit"
    result = {way: counts[way] for way in ("passed", "failed", "skipped")}
    result["failed"] += counts["error"]
    if uncommitted or head(ROOT) != commit:
        print(f"{name}: not recorded, as not of the commit {commit}:\n{uncommitted}")
    elif counts["deselected"] or not result["passed"] + result["failed"]:
        print(f"{name}: not recorded, as not all of the tests have run")
        return code or 1
    else:
        when = {"commit": commit, "date": datetime.date.today().isoformat()}
        minutes = round((time.monotonic() - start) / 60)
        hashes = {file: _hash_of_file(ROOT / file) for file in names}
        _record(name, {**when, "minutes": minutes, **result}, hashes)
    return code


def _record(name: str, result: Result, hashes: dict[str, str]) -> None:
    with _writing:
        results, opened = _read(ROOT)
        results[name], opened[name] = result, hashes
        tests = defaultdict(list)
        for each in sorted(results.keys() & set(_tests(ROOT))):
            for file, hash_ in opened[each].items():
                tests[file, hash_].append(each)
        lines = [f"{key[1]} {key[0]} {','.join(tests[key])}\n" for key in sorted(tests)]
        (ROOT / OPENED).write_text("".join(lines), encoding="utf-8")
        (ROOT / RECORD).write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def _read(root: Path) -> tuple[dict[str, Result], dict[str, dict[str, str]]]:
    # By file of tests: its result, and the hashes of the files that it opened.
    if not (root / RECORD).exists() or not (root / OPENED).exists():
        return {}, {}
    opened: dict[str, dict[str, str]] = defaultdict(dict)
    for line in (root / OPENED).read_text(encoding="utf-8").splitlines():
        hash_, file, tests = line.split(" ")
        for name in tests.split(","):
            opened[name][file] = hash_
    return json.loads((root / RECORD).read_text(encoding="utf-8")), opened


def _tests(root: Path) -> list[str]:
    return sorted(path.name for path in (root / FOLDER).glob("test_*.py"))


def _changes(root: Path, name: str, opened: dict[str, dict[str, str]]) -> list[str]:
    # Why the record of a file of tests is old.
    if name not in opened:
        return [f"{FOLDER}/{name} is new"]
    files = opened[name].items()
    return [f"{file} changed" for file, hash_ in files if _hash_of_file(root / file) != hash_]


def _hash_of_file(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest() if path.is_file() else ""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--run", action="store_true", help="run the tests; more goes to pytest")
    args, pytest_arguments = options.parse_known_args()
    if args.run:
        return run(pytest_arguments)
    print(record_state())
    return 0


if __name__ == "__main__":
    sys.exit(main())
