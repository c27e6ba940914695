"""Runs the tests on a null GPU and records how they ended; says whether the record is current.

    .venv-cuda/bin/python tools/cuda_record.py --run    as `make test-cuda` does
    python tools/cuda_record.py                         compares the record with the files it covers

The record, tests/nullgpu/passed.json, has the commit, the date, the numbers of tests that passed
and failed, and a digest of the covered files. These tests need 9 GB of packages, so CI does not run
them: its last line says which of these files have changed since they last passed."""

import argparse
import ast
import datetime
import hashlib
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path("tests/nullgpu/passed.json")
COVERED_PATHS = (
    "kernels/r1_kernels",
    "megatron_r1/models",
    "megatron_r1/trainer",
    "megatron_r1/engines/plugin",
    "megatron_r1/controller/push",
    "megatron_r1/push",
    "requirements/cuda.lock",
    "tests/gpu/test_push_cuda_ipc.py",
    "tests/nullgpu",
    "tests/unit/null_gpu",
    "tools/null_gpu",
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


def digests(root: Path = ROOT) -> dict[str, str]:
    """Return a digest of each of `COVERED_PATHS`: of names and code of its tracked files."""
    return {covered: _code_digest(root, covered) for covered in COVERED_PATHS}


def _code_digest(root: Path, covered: str) -> str:
    names = _git_output(root, "ls-files", "-z", "--", covered).split("\0")
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(filter(None, names)):
        if Path(name) != RECORD and (root / name).exists():
            content = (root / name).read_bytes()
            if name.endswith(".py"):
                content = code_of(content.decode()).encode()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def code_of(text: str) -> str:
    """Return a Python file without comments, docstrings and empty lines, which compute nothing.

    Raises:
        SyntaxError: The text is not Python.
    """
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            if isinstance(node.value.value, str):  # a docstring
                lines[first:last] = [""] * (last - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def record_state(root: Path = ROOT) -> str:
    """Return a sentence that says whether the record is of the present files."""
    remedy = "run `make test-cuda`"
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"null GPU: no record of a run; {remedy}"
    run = f"{record['passed']} passed, {record['failed']} failed at {record['commit']}, "
    run += record["date"]
    present = digests(root)
    changed = [name for name in present if record["files"].get(name) != present[name]]
    if changed:
        return f"null GPU: the record is old ({run}): {', '.join(changed)} changed; {remedy}"
    return f"null GPU: the record is current: {run}"


def run(arguments: list[str]) -> int:
    """Run the tests and write the record; return pytest's exit code."""
    import pytest

    counts, file_digests = Counts(), digests()
    code = pytest.main([str(ROOT / "tests/nullgpu"), *arguments], plugins=[counts])
    if not counts.is_whole or not counts.passed + counts.failed:
        print(f"{RECORD} stays as it is: not all of the tests have run")
        return code or 1
    record = {
        "commit": _git_output(ROOT, "rev-parse", "--short=12", "HEAD").strip(),
        "date": datetime.date.today().isoformat(),
        "passed": counts.passed,
        "failed": counts.failed,
        "skipped": counts.skipped,
        "files": file_digests,
    }
    unfinished = ROOT / f"{RECORD}.new"
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(ROOT / RECORD)
    return code


def _git_output(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
