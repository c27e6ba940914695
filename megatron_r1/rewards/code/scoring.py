"""What one test says of a program."""

from dataclasses import dataclass

from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox.process import Budget, Outcome

SIGNALS = {
    6: "aborted",
    7: "bus error",
    8: "arithmetic error, such as a division by zero",
    9: "killed",
    11: "segmentation fault or abort",  # abort() ends so where SIGABRT is ignored, as in process 1
    24: "CPU time limit",
    25: "file size limit",
    31: "forbidden system call",
}


@dataclass(frozen=True)
class TestScore:
    """score: 1 for a test that is passed, less only from a checker that gives partial scores."""

    score: float
    reason: str


def describe_failure(outcome: Outcome, budget: Budget) -> str:
    """Which limit the program ran into or how it crashed; empty for one that ended well."""
    if outcome.stopped == "wall time":
        return f"time limit: stopped after {budget.wall_seconds:.3g} s"
    if outcome.stopped == "output":
        return f"output limit: over {budget.output_bytes / 2**20:g} MiB"
    if outcome.status == 0:
        return ""
    words = _last_line(outcome.stderr)
    if any(name in words for name in ("MemoryError", "bad_alloc")):
        return f"memory limit of {budget.memory_bytes / 2**20:g} MiB: {words}"
    ending = f"exit status {outcome.status}"
    if outcome.status > 128:
        signal = outcome.status - 128
        ending = SIGNALS.get(signal, f"signal {signal}")
        if signal == 9 and outcome.seconds >= budget.cpu_seconds:
            return f"time limit: {budget.cpu_seconds:g} s of CPU"
    return f"runtime error ({ending})" + (f": {words}" if words else "")


def _last_line(stderr: bytes) -> str:
    lines = stderr[-2000:].decode("utf-8", "replace").splitlines()
    return shorten(next((line for line in reversed(lines) if line.strip()), ""), 160)
