"""A sandbox while it runs: read what comes out, keep the time, end it whole.

bwrap waits (`--block-fd`) when it has built the sandbox, so that its process 1, the program, is
held by a pidfd before it starts. When that process ends, by itself or by SIGKILL, the kernel ends
every other one in the sandbox; bwrap waits for that, and nothing is returned before bwrap has
ended.
"""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass

from megatron_r1.rewards.base import shorten

SETUP_SECONDS = 20.0
ENDING_SECONDS = 20.0


class SandboxError(RuntimeError):
    """bubblewrap could not build the sandbox or did not end: nothing is known of the program."""


@dataclass(frozen=True)
class Budget:
    """What one run may use; seconds and bytes. disk_bytes: files it may write, of a compiler."""

    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    stack_bytes: int
    processes: int
    output_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Outcome:
    """stdout, stderr: what was written, cut where `stopped` says so. status: exit status, or 128 +
    the signal. seconds: wall time of sandbox and program, never less than the CPU time that counts
    against the limit, as the program's process builds the sandbox too. stopped: the limit for which
    it was killed from outside ("wall time", "output"), else empty."""

    stdout: bytes
    stderr: bytes
    status: int
    seconds: float
    stopped: str


class SandboxProcess:
    """A running bwrap."""

    def __init__(
        self, process: subprocess.Popen, status: int, block: int, budget: Budget, began: float
    ) -> None:
        """began: time.monotonic() before it was started."""
        self.process, self.status, self.block, self.budget = process, status, block, budget
        self.first: int | None = None  # pidfd of the sandbox's process 1
        self.stdout, self.stderr = process.stdout.fileno(), process.stderr.fileno()
        self.read = {self.stdout: bytearray(), self.stderr: bytearray(), status: bytearray()}
        self.began = began
        self.deadline = began + SETUP_SECONDS

    def outcome(self) -> Outcome:
        stopped = self._watch()
        seconds = time.monotonic() - self.began
        self._kill()
        exit_status = self._exit_status()
        stdout, stderr = bytes(self.read[self.stdout]), bytes(self.read[self.stderr])
        if exit_status is None and (self.first is None or not stopped):
            words = shorten(stderr.decode("utf-8", "replace"), 300) or "no message"
            raise SandboxError(f"bubblewrap could not build a sandbox: {words}")
        status = 128 + signal.SIGKILL if exit_status is None else exit_status
        return Outcome(stdout, stderr, status, seconds, stopped)

    def end(self) -> None:
        """Safe after anything; also closes the descriptors."""
        try:
            self._kill()
        finally:
            self.process.stdout.close()
            self.process.stderr.close()
            for descriptor in (self.status, self.block, self.first):
                if descriptor is not None:
                    os.close(descriptor)

    def _watch(self) -> str:
        """Reads until all ends are closed; or the name of the limit that was reached."""
        poll = select.poll()
        for descriptor in self.read:
            poll.register(descriptor, select.POLLIN)
        num_open = len(self.read)
        while num_open:
            left = self.deadline - time.monotonic()
            if left <= 0:
                return "wall time"
            for descriptor, _ in poll.poll(math.ceil(left * 1000)):
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    poll.unregister(descriptor)
                    num_open -= 1
                self.read[descriptor] += chunk
                if descriptor == self.status and self.first is None and b"\n" in chunk:
                    self._release()
            if len(self.read[self.stdout]) + len(self.read[self.stderr]) > self.budget.output_bytes:
                return "output"
        return ""

    def _release(self) -> None:
        """The sandbox has a process 1: hold it, then let the program start."""
        pid = json.loads(self.read[self.status].partition(b"\n")[0])["child-pid"]
        try:
            first = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # bwrap failed: it says why, and no exit status follows
        if _parent_of(pid) != self.process.pid:  # failed too, and the number is another's by now
            os.close(first)
            return
        self.first = first
        self.deadline = time.monotonic() + self.budget.wall_seconds
        with contextlib.suppress(BrokenPipeError):
            os.write(self.block, b"!")

    def _kill(self) -> None:
        """Ends everything in the sandbox, if it has not ended, and waits for it."""
        if self.first is None:
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            ended = select.poll()
            ended.register(self.first, select.POLLIN)
            if not ended.poll(ENDING_SECONDS * 1000):
                self.process.kill()
                raise SandboxError(f"a sandbox did not end within {ENDING_SECONDS:g} s")
        self.process.wait()

    def _exit_status(self) -> int | None:
        """The program's, from bwrap; None when bwrap never came to start it."""
        os.set_blocking(self.status, False)
        with contextlib.suppress(BlockingIOError):
            self.read[self.status] += os.read(self.status, 65536)
        for line in bytes(self.read[self.status]).splitlines():
            report = json.loads(line)
            if "exit-code" in report:
                return report["exit-code"]
        return None


def _parent_of(pid: int) -> int | None:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])
    return None
