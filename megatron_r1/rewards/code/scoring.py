"""The score of a program on one test."""

from dataclasses import dataclass

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox.limits import Budget
from megatron_r1.rewards.sandbox.process import Outcome

SIGNALS = {
    6: "aborted",
    7: "bus error",
    8: "arithmetic error, such as a division by zero",
    9: "killed",
    11: "segmentation fault or abort",  # abort() where SIGABRT is ignored, as in process 1
    24: "CPU time limit",
    25: "file size limit",
    31: "forbidden system call",
}


@dataclass(frozen=True)
class TestScore:
    """score: 1 for a passed test, 0 for a failed one; in between only from a checker."""

    score: float
    reason: str


def describe_failure(outcome: Outcome, budget: Budget) -> str:
    """Return which limit the program exceeded or how it crashed; "" if it exited normally."""
    if outcome.stopped == "wall time":
        return f"time limit: stopped after {budget.wall_seconds:.3g} s"
    if outcome.stopped == "output":
        return f"output limit: over {budget.output_bytes / 2**20:g} MiB"
    if outcome.status == 0:
        return ""
    message = _last_line(outcome.stderr)
    if any(name in message for name in ("MemoryError", "bad_alloc")):
        return f"memory limit of {budget.memory_bytes / 2**20:g} MiB: {message}"
    ending = f"exit status {outcome.status}"
    if outcome.status > 128:
        signal = outcome.status - 128
        ending = SIGNALS.get(signal, f"signal {signal}")
        if signal == 9 and outcome.seconds >= budget.cpu_seconds:
            return f"time limit: {budget.cpu_seconds:g} s of CPU"
    return f"runtime error ({ending})" + (f": {message}" if message else "")


def _last_line(stderr: bytes) -> str:
    lines = stderr[-2000:].decode("utf-8", "replace").splitlines()
    return shorten(next((line for line in reversed(lines) if line.strip()), ""), 160)
