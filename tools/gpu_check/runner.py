"""Runs the checks one after the other, each in a process of its own, within the time there is."""

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

from tools.bench.host import ROOT, environment
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
    """The outcome of a check.

    Attributes:
        check: the check.
        status: `verdict.PASSED`, `FAILED`, `IMPOSSIBLE` or `NO_TIME`.
        seconds: how long it took.
        reason: the reason of each but the first.
        tail: the end of its output.
        figures: what it has measured."""

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
    """Yield the outcome of every check, in order.

    Args:
        checks: the checks to run.
        out: the folder of results.
        deadline: the time at which the checks must have ended, as `time.time()`.
        num_gpus: the number of GPUs of this machine."""
    for check in checks:
        missing_modules = [name for name in check.needs if not _is_installed(name)]
        remaining_seconds = deadline - time.time()
        if missing_modules:
            reason = f"not installed: {', '.join(missing_modules)}"
            yield CheckOutcome(check, verdict.IMPOSSIBLE, 0.0, reason)
        elif num_gpus < check.num_gpus:
            reason = f"it needs {check.num_gpus} GPUs; there: {num_gpus}"
            yield CheckOutcome(check, verdict.IMPOSSIBLE, 0.0, reason)
        elif remaining_seconds < SHORTEST_SECONDS:
            yield CheckOutcome(check, NO_TIME, 0.0, "raise --minutes, or choose it by --only")
        else:
            yield _run_check(check, out, min(check.seconds, remaining_seconds))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _run_check(check: Check, out: Path, seconds: float) -> CheckOutcome:
    arguments = [part.format(out=out) for part in check.arguments]
    log = out / f"{check.name.replace(' ', '-').replace(chr(39), '')}.log"
    start_time = time.time()
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
            _stop_check(process)
    lines = log.read_text(errors="replace").splitlines()
    status, reason, figures = _verdict_of(code, lines)
    if code is None and status != verdict.PASSED:
        is_cut = seconds < check.seconds
        status = NO_TIME if is_cut else verdict.FAILED
        reason = f"stopped after {seconds:.0f} s{', when the time of all was over' * is_cut}"
    output_lines = [line for line in lines if not line.startswith((verdict.MARK, *NOISE))]
    tail = output_lines[-TAIL_LINES:]
    return CheckOutcome(check, status, time.time() - start_time, reason, tail, figures)


def _stop_check(process: subprocess.Popen[bytes]) -> None:
    """End a check, which stops what it has started, in sessions of their own too."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict_of(code: int | None, lines: list[str]) -> verdict.Verdict:
    """Return what a check said, or else what pytest did, which also ends with 0 if all tests were
    skipped: passed is where something ran."""
    if printed_verdict := verdict.read(lines):
        is_consistent = (code == 0) == (printed_verdict.status != verdict.FAILED)
        return printed_verdict if is_consistent else printed_verdict._replace(status=verdict.FAILED)
    summaries = [line for line in lines if re.search(r"\d+ (passed|skipped|failed|error)", line)]
    summary = summaries[-1].strip("= ") if summaries else ""
    if code != 0:
        return verdict.Verdict(verdict.FAILED, summary or f"it ended with status {code}")
    if "skipped" in summary and "passed" not in summary:
        skip_lines = [line for line in lines if line.startswith("SKIPPED")]
        return verdict.Verdict(verdict.IMPOSSIBLE, (skip_lines or [summary])[-1].strip("= "))
    return verdict.Verdict(verdict.PASSED, figures={"tests": summary} if summary else {})
