"""Runs checks one after the other, each in a process of its own, within the time there is."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.children import ROOT, environment
from tools.gpu_check import verdict
from tools.gpu_check.checks import Check

SHORTEST_SECONDS = 20.0
"""A check is not begun with less time than this."""
GRACE_SECONDS = 20.0
"""How long a check whose time is over may take to stop what it has started."""
TAIL_LINES = 25
NO_TIME = "no time"
NOISE = ("nanobind: ", " - leaked ", " - ... skipped remainder", "See https://nanobind")
"""Beginnings of lines that Triton's libraries print when Python ends."""


@dataclass
class CheckOutcome:
    """The outcome of a check. status: `verdict.PASSED`, `FAILED`, `IMPOSSIBLE` or `NO_TIME`.
    reason: of each but the first. tail: the end of its output. figures: what it has measured."""

    check: Check
    status: str
    seconds: float
    reason: str = ""
    tail: list[str] = field(default_factory=list)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the outcome with the command as it is typed."""
        return {
            "name": self.check.name,
            "command": self.check.command,
            "settles": self.check.settles,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "figures": self.figures,
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
            why = f"not installed: {', '.join(missing)}"
            yield CheckOutcome(check, verdict.IMPOSSIBLE, 0.0, why)
        elif num_gpus < check.num_gpus:
            why = f"it needs {check.num_gpus} GPUs; there: {num_gpus}"
            yield CheckOutcome(check, verdict.IMPOSSIBLE, 0.0, why)
        elif left < SHORTEST_SECONDS:
            yield CheckOutcome(check, NO_TIME, 0.0, "raise --minutes, or choose it by --only")
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
            code = None
            _stop(process)
    lines = log.read_text(errors="replace").splitlines()
    status, reason, figures = _verdict(code, lines)
    if code is None and status != verdict.PASSED:
        is_cut = seconds < check.seconds
        status = NO_TIME if is_cut else verdict.FAILED
        reason = f"stopped after {seconds:.0f} s{', when the time of all was over' * is_cut}"
    shown = [line for line in lines if not line.startswith((verdict.MARK, *NOISE))]
    return CheckOutcome(check, status, time.time() - began, reason, shown[-TAIL_LINES:], figures)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a check, which stops what it has started, in sessions of their own too."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(code: int | None, lines: list[str]) -> verdict.Verdict:
    """Return what a check said, or else what pytest did, which also ends with 0 if all tests were
    skipped: passed is where something ran."""
    if said := verdict.read(lines):
        is_consistent = (code == 0) == (said.status != verdict.FAILED)
        return said if is_consistent else said._replace(status=verdict.FAILED)
    summaries = [line for line in lines if re.search(r"\d+ (passed|skipped|failed|error)", line)]
    last = summaries[-1] if summaries else ""
    if code != 0:
        return verdict.Verdict(verdict.FAILED, last.strip("= ") or f"it ended with status {code}")
    if "skipped" in last and "passed" not in last:
        why = [line for line in lines if line.startswith("SKIPPED")]
        return verdict.Verdict(verdict.IMPOSSIBLE, (why or [last])[-1].strip("= "))
    return verdict.Verdict(verdict.PASSED, figures={"tests": last.strip("= ")} if last else {})
