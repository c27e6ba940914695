"""Runs checks one after the other, each in a process of its own, within the time there is."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.children import ROOT, environment
from tools.gpu_check.checks import Check

SHORTEST_SECONDS = 20.0
"""A check is not begun with less time than this."""
TAIL_LINES = 25


@dataclass
class CheckOutcome:
    """The outcome of a check. status: passed, failed, skipped or no time. tail: the end of its
    output, or why it did not run."""

    check: Check
    status: str
    seconds: float
    tail: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the outcome with the command as it is typed."""
        return {
            "name": self.check.name,
            "command": self.check.command,
            "settles": self.check.settles,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "tail": self.tail,
        }


def run_all(
    checks: Sequence[Check], out: Path, deadline: float, num_gpus: int
) -> Iterator[CheckOutcome]:
    """Yield the outcome of every check, in order. deadline: as `time.time()`."""
    for check in checks:
        missing = [name for name in check.needs if not _is_installed(name)]
        left = deadline - time.time()
        if missing:
            yield CheckOutcome(check, "skipped", 0.0, [f"not installed: {', '.join(missing)}"])
        elif num_gpus < check.num_gpus:
            yield CheckOutcome(check, "skipped", 0.0, [f"it needs {check.num_gpus} GPUs"])
        elif left < SHORTEST_SECONDS:
            yield CheckOutcome(check, "no time", 0.0, ["raise --minutes, or choose it by --only"])
        else:
            yield _run(check, out, min(check.seconds, left))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _run(check: Check, out: Path, seconds: float) -> CheckOutcome:
    arguments = [part.format(out=out) for part in check.arguments]
    log = out / f"{check.name.replace(' ', '-').replace(chr(39), '')}.log"
    began = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    if code is None:
        lines.append(f"stopped after {seconds:.0f} s")
    return CheckOutcome(check, _verdict(code, lines), time.time() - began, lines)


def _verdict(code: int | None, lines: list[str]) -> str:
    """Return "passed" where something ran: pytest also ends with 0 if all tests were skipped."""
    if code != 0:
        return "failed"
    last = lines[-1] if lines else ""
    return "skipped" if "skipped" in last and "passed" not in last else "passed"
