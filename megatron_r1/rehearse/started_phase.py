"""Waits for the command of a phase, which fails with the errors in its log."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.base.errors import RunError
from megatron_r1.base.processes.log_excerpts import last_lines

POLL_SECONDS = 0.05
"""Short: three steps of a small model take two seconds, and the kill should follow the first."""
ERROR = re.compile(r"megatron-r1: .*(?:\n(?:\[\w+\]:)?  .*)*")
"""A command's error with the indented lines behind it, such as the end of an engine's log. torchrun
writes the rank before each line."""


@dataclass
class StartedPhase:
    """A started command.

    Attributes:
        title: the phase's name.
        process: the command.
        log: the file of its output.
        stacks_path: the stacks of a controller that does not answer.
        timeout_seconds: the longest that it may take.
        started_at: `time.monotonic()` at its start.
        seconds: wall time that it took.
        cpu_seconds: CPU time of it and its children."""

    title: str
    process: subprocess.Popen[bytes]
    log: Path
    stacks_path: Path
    timeout_seconds: float
    started_at: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def wait(self, condition: Callable[[], object]) -> None:
        """Wait until `condition()` is true; a command that ends before has failed."""
        while not condition():
            if self.process.poll() is not None:
                self._raise_run_error(f"the command ended with status {self.process.returncode}")
            self._check_time()
            time.sleep(POLL_SECONDS)

    def wait_for_end(self) -> None:
        """Wait until the command ends with status 0."""
        while self.process.poll() is None:
            self._check_time()
            time.sleep(POLL_SECONDS)
        if self.process.returncode:
            self._raise_run_error(f"the command ended with status {self.process.returncode}")

    def _check_time(self) -> None:
        if time.monotonic() - self.started_at > self.timeout_seconds:
            self._raise_run_error(f"not done after {self.timeout_seconds:g} s")
        if self.stacks_path.exists() and self.stacks_path.stat().st_size:
            self._raise_run_error(f"the controller does not answer; its stacks: {self.stacks_path}")

    def _raise_run_error(self, reason: str) -> None:
        cause = "\n".join(find_errors(self.log)) or f"{self.log} ends:\n{last_lines(self.log)}"
        raise RunError(f"rehearse: {self.title}: {reason}\n{cause}")


def find_errors(log: Path) -> list[str]:
    """Return the command's own errors in its log, each with its cause. torchrun's report, which
    comes last, does not have them."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return [re.sub(r"\n\[\w+\]:", "\n", error) for error in ERROR.findall(text)]
