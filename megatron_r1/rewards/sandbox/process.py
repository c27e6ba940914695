"""A running sandbox: collect its output, enforce its wall time, kill all of its processes.

bwrap builds the sandbox and then waits for the filter of system calls, which comes through a pipe,
so that a pidfd of the sandbox's process 1, which becomes the program, is open before the program
starts. When process 1 ends, by itself or by SIGKILL, the kernel kills every other process of the
sandbox; bwrap waits for that, and no result is returned before bwrap has ended.

If this process is killed first, the pipe ends without a filter, and bwrap fails. (`--block-fd`
would let the program start then, without a limit on its time: process 1 arranges to die with bwrap,
by `--die-with-parent`, only after that wait, when bwrap may be gone.)"""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import BinaryIO, Literal

import psutil

from megatron_r1.errors import RunError
from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.sandbox.limits import Budget

SETUP_SECONDS = 20.0
ENDING_SECONDS = 20.0
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

Stopped = Literal["wall time", "output", ""]


class SandboxError(RunError):
    """bubblewrap could not build the sandbox or did not end: the program has no outcome."""


@dataclass(frozen=True)
class ProgramOutcome:
    """The outcome of one run.

    stdout, stderr: the bytes written, cut off at the limit that `stopped` names. status: the exit
    status, or 128 + the signal. seconds: wall time of sandbox and program, never less than the CPU
    time that counts against the limit, since the program's process also builds the sandbox.
    stopped: the limit for which the run was killed from outside, or ""."""

    stdout: bytes
    stderr: bytes
    status: int
    seconds: float
    stopped: Stopped


class SandboxProcess:
    """A running bwrap process and the sandbox below it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        status_fd: int,
        filter_file: BinaryIO,
        system_calls: bytes,
        budget: Budget,
        started: float,
    ) -> None:
        """status_fd: reads bwrap's `--json-status-fd`. filter_file: where bwrap waits for
        `system_calls`, the program of its `--seccomp`, less than a pipe holds. started:
        time.monotonic() before bwrap was started."""
        assert process.stdout is not None and process.stderr is not None, "started with pipes"
        self.process, self.budget = process, budget
        self.status_fd = status_fd
        self.filter_file, self.system_calls = filter_file, system_calls
        self.init_pidfd: int | None = None  # of the sandbox's process 1
        self.stdout_fd, self.stderr_fd = process.stdout.fileno(), process.stderr.fileno()
        self.received = {fd: bytearray() for fd in (self.stdout_fd, self.stderr_fd, status_fd)}
        self.started = started
        self.deadline = started + SETUP_SECONDS

    def wait(self) -> ProgramOutcome:
        """Return the outcome of the program, killing it at its limits. Raises SandboxError."""
        stopped = self._collect_output()
        seconds = time.monotonic() - self.started
        self._kill()
        exit_status = self._exit_status()
        stdout, stderr = (bytes(self.received[fd]) for fd in (self.stdout_fd, self.stderr_fd))
        if exit_status is None and (self.init_pidfd is None or not stopped):
            message = shorten(stderr.decode("utf-8", "replace"), 300) or "no message"
            raise SandboxError(f"bubblewrap could not build a sandbox: {message}")
        status = 128 + signal.SIGKILL if exit_status is None else exit_status
        return ProgramOutcome(stdout, stderr, status=status, seconds=seconds, stopped=stopped)

    def close(self) -> None:
        """Kill the sandbox if it still runs. Safe in any state."""
        try:
            self._kill()
        finally:
            if self.init_pidfd is not None:
                os.close(self.init_pidfd)

    def _collect_output(self) -> Stopped:
        """Read until all pipes are closed. Return the limit that was reached first, or ""."""
        poll = select.poll()
        for fd in self.received:
            poll.register(fd, select.POLLIN)
        num_open = len(self.received)
        while num_open:
            seconds_left = self.deadline - time.monotonic()
            if seconds_left <= 0:
                return "wall time"
            for fd, _ in poll.poll(math.ceil(seconds_left * 1000)):
                chunk = os.read(fd, 65536)
                if not chunk:
                    poll.unregister(fd)
                    num_open -= 1
                self.received[fd] += chunk
                if fd == self.status_fd and self.init_pidfd is None and b"\n" in chunk:
                    self.start_program()
            num_bytes = len(self.received[self.stdout_fd]) + len(self.received[self.stderr_fd])
            if num_bytes > self.budget.output_bytes:
                return "output"
        return ""

    def start_program(self) -> None:
        """Open a pidfd of the sandbox's process 1, then let the program start."""
        pid = json.loads(self.received[self.status_fd].partition(b"\n")[0])["child-pid"]
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # bwrap failed: it writes why, and no exit status follows
        try:
            is_child = psutil.Process(pid).ppid() == self.process.pid
        except psutil.Error:
            is_child = False
        if not is_child:  # bwrap failed, and another process has the number by now
            os.close(pidfd)
            return
        self.init_pidfd = pidfd
        self.deadline = time.monotonic() + self.budget.wall_seconds
        with contextlib.suppress(BrokenPipeError), self.filter_file:
            self.filter_file.write(self.system_calls)

    def _kill(self) -> None:
        """Kill every process of the sandbox that still runs, and wait for the end of all."""
        if self.init_pidfd is None:
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init_pidfd, signal.SIGKILL)
            ended = select.poll()
            ended.register(self.init_pidfd, select.POLLIN)
            if not ended.poll(ENDING_SECONDS * 1000):
                self.process.kill()
                raise SandboxError(f"a sandbox did not end within {ENDING_SECONDS:g} s")
        self.process.wait()

    def _exit_status(self) -> int | None:
        """Return the program's exit status as bwrap reports it; None if it never started."""
        os.set_blocking(self.status_fd, False)
        with contextlib.suppress(BlockingIOError):
            self.received[self.status_fd] += os.read(self.status_fd, 65536)
        for line in bytes(self.received[self.status_fd]).splitlines():
            report = json.loads(line)
            if "exit-code" in report:
                return report["exit-code"]
        return None


def describe_failure(outcome: ProgramOutcome, budget: Budget) -> str:
    """Return which limit the program exceeded or how it crashed; "" if it exited normally."""
    if outcome.stopped == "wall time":
        return f"time limit: stopped after {budget.wall_seconds:.3g} s"
    if outcome.stopped == "output":
        return f"output limit: over {budget.output_bytes / 2**20:g} MiB"
    if outcome.status == 0:
        return ""
    lines = outcome.stderr[-2000:].decode("utf-8", "replace").splitlines()
    message = shorten(next((line for line in reversed(lines) if line.strip()), ""), 160)
    if any(name in message for name in ("MemoryError", "bad_alloc")):
        return f"memory limit of {budget.memory_bytes / 2**20:g} MiB: {message}"
    ending = f"exit status {outcome.status}"
    if outcome.status > 128:
        signal = outcome.status - 128
        ending = SIGNALS.get(signal, f"signal {signal}")
        if signal == 9 and outcome.seconds >= budget.cpu_seconds:
            return f"time limit: {budget.cpu_seconds:g} s of CPU"
    return f"runtime error ({ending})" + (f": {message}" if message else "")
