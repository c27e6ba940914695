"""Runs the tests on a null GPU and records how they ended; says whether the record is current.

    .venv-cuda/bin/python -m tools.cuda_record --run    as `make test-cuda` does
    python -m tools.cuda_record                         compares the record with the files it covers

The record, tests/nullgpu/passed.json, has the commit, the date and the numbers of tests that passed
and failed. These tests need 9 GB of packages, so CI does not run them: one of its last lines says
which of the covered files compute something else since (`tools.evidence.records.CodeChanges`)."""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from tools.evidence.records import PRIMITIVES, CodeChanges, head

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path("tests/nullgpu/passed.json")
COVERED_PATHS = (
    "kernels/r1_kernels/",
    PRIMITIVES,
    "megatron_r1/models/",
    "megatron_r1/trainer/",
    "megatron_r1/engines/plugin/",
    "megatron_r1/controller/push/",
    "megatron_r1/push/",
    "requirements/cuda.lock",
    "tests/gpu/test_push_cuda_ipc.py",
    "tests/nullgpu/",
    "tests/unit/null_gpu/",
    "tools/null_gpu/",
)
"""Files and folders whose code runs in these tests."""


class Counts:
    """A pytest plugin that counts how tests ended."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0
        self.is_whole = True

    def pytest_deselected(self, items: object) -> None:
        self.is_whole = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1


def record_state(root: Path = ROOT) -> str:
    """Return a sentence that says whether the record is of the present code."""
    remedy = "run `make test-cuda`"
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"null GPU: no record of a run; {remedy}"
    run = f"{record['passed']} passed, {record['failed']} failed at {record['commit']}, "
    run += record["date"]
    changed = CodeChanges(root).files(record["commit"], list(COVERED_PATHS))
    if changed is None:
        return f"null GPU: {run}; this clone does not have the commit to compare with"
    changed = [name for name in changed if name != RECORD.as_posix()]
    if changed:
        return f"null GPU: the record is old ({run}): {', '.join(changed)} changed; {remedy}"
    return f"null GPU: the record is current: {run}"


def run(arguments: list[str]) -> int:
    """Run the tests and write the record; return pytest's exit code.

    Nothing is recorded of code that is not committed, as the record names a commit."""
    import pytest

    counts, commit = Counts(), head(ROOT)
    uncommitted = CodeChanges(ROOT).files(commit, list(COVERED_PATHS))
    code = pytest.main([str(ROOT / "tests/nullgpu"), *arguments], plugins=[counts])
    if uncommitted:
        print(f"{RECORD} stays as it is: not committed: {', '.join(uncommitted)}")
        return code
    if not counts.is_whole or not counts.passed + counts.failed:
        print(f"{RECORD} stays as it is: not all of the tests have run")
        return code or 1
    record = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "passed": counts.passed,
        "failed": counts.failed,
        "skipped": counts.skipped,
    }
    unfinished = ROOT / f"{RECORD}.new"
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(ROOT / RECORD)
    return code


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
