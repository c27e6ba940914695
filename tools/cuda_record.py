"""Runs the tests on a null GPU and records how they ended; says whether the record is current.

    .venv-cuda/bin/python -m tools.cuda_record --run    as `make test-cuda` does
    python -m tools.cuda_record                         compares the record with the files it is of

The record, tests/nullgpu/passed.json, has the commit, the date and the numbers of tests that passed
and failed; opened.txt next to it has the repository's files that the tests and all their processes
opened (`tools.opened_files`), each with a hash of its bytes, pages aside. These tests need 9 GB of
packages, so CI does not run them: one of its last lines names the files that have changed since."""

import argparse
import datetime
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.evidence.records import git_output, head
from tools.opened_files import run_traced

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path("tests/nullgpu/passed.json")
COUNTS = "R1_TEST_COUNTS"
"""Variable: the file that the tests' process writes its counts to."""
OPENED = Path("tests/nullgpu/opened.txt")
DESELECTED = ".deselected"
"""The end of the name of a file next to the counts, which exists if a test was left out."""
PAGES = (".md", RECORD.name, OPENED.name)
"""Ends of names of files that the record is not of."""
CACHED_MODULE = re.compile(r"__pycache__/([^/.]+)\.[^/]*\.pyc$")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write how many tests ended in each way: a hook of `pytest -p tools.cuda_record`."""
    counts = {way: len(reports) for way, reports in terminalreporter.stats.items()}
    Path(os.environ[COUNTS]).write_text(json.dumps(counts), encoding="utf-8")


def pytest_deselected(items: list[Any]) -> None:
    """Note that not all tests run: a hook, also of pytest-xdist's workers, which tell nobody."""
    if items:
        Path(os.environ[COUNTS] + DESELECTED).touch()


def record_state(root: Path = ROOT) -> str:
    """Return a sentence that says whether the record is of the present files."""
    remedy = "run `make test-cuda`"
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
        text = (root / OPENED).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"null GPU: no record of a run and the files it opened; {remedy}"
    run = f"{record['passed']} passed, {record['failed']} failed at {record['commit']}, "
    run += record["date"]
    if _hash(text.encode()) != record.get("opened"):
        return f"null GPU: {OPENED.name} is not of the same run as {RECORD.name}; {remedy}"
    hashes = [line.split(" ", 1) for line in text.splitlines()]
    changed = [f"{name} changed" for value, name in hashes if _hash_of_file(root / name) != value]
    tests = (f"{OPENED.parent}/{path.name}" for path in (root / OPENED).parent.glob("test_*.py"))
    changed += [f"{name} is new" for name in sorted({*tests} - {name for _, name in hashes})]
    if changed:
        return f"null GPU: the record is old ({run}): {', '.join(changed)}; {remedy}"
    return f"null GPU: the record is current: {run}, which opened {len(hashes)} files"


def sources(root: Path, opened: Iterable[str]) -> list[str]:
    """Return the names within the repository of the files that are its own, pages aside: for a
    cached module its source. What git ignores is not its own."""
    paths = {os.path.realpath(CACHED_MODULE.sub(r"\1.py", name)) for name in opened}
    own = git_output(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard") or ""
    inside = {os.path.relpath(path, root.resolve()) for path in paths}
    return sorted(name for name in inside & set(own.split("\0")) if not name.endswith(PAGES))


def run(arguments: list[str]) -> int:
    """Run the tests and write the record; return pytest's exit code.

    Nothing is recorded of code that is not committed, as the record names a commit."""
    commit = head(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[COUNTS] = f"{folder}/counts"
        pytest = [sys.executable, "-m", "pytest", "-p", "tools.cuda_record", "tests/nullgpu"]
        code, opened = run_traced([*pytest, *arguments])
        counts = Counter(json.loads(Path(os.environ[COUNTS]).read_text(encoding="utf-8")))
        are_left_out = Path(os.environ[COUNTS] + DESELECTED).exists()
    names = sources(ROOT, opened)
    uncommitted = git_output(ROOT, "status", "--porcelain", "--", *names) if commit else "no commit"
    if uncommitted or head(ROOT) != commit:
        print(f"{RECORD} stays as it is: not of the commit {commit}:\n{uncommitted}")
        return code
    failed = counts["failed"] + counts["error"]
    if are_left_out or not counts["passed"] + failed:
        print(f"{RECORD} stays as it is: not all of the tests have run")
        return code or 1
    text = "".join(f"{_hash_of_file(ROOT / name)} {name}\n" for name in names)
    record = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "passed": counts["passed"],
        "failed": failed,
        "skipped": counts["skipped"],
        "opened": _hash(text.encode()),
    }
    (ROOT / OPENED).write_text(text, encoding="utf-8")
    (ROOT / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return code


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def _hash_of_file(path: Path) -> str:
    return _hash(path.read_bytes()) if path.is_file() else ""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--run", action="store_true", help="run the tests; more goes to pytest")
    args, pytest_arguments = options.parse_known_args()
    if args.run:
        return run(pytest_arguments)
    if pytest_arguments:
        options.error(f"unknown: {' '.join(pytest_arguments)}")
    print(record_state())
    return 0


if __name__ == "__main__":
    sys.exit(main())
