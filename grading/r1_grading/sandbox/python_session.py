"""A Python interpreter in a sandbox that lives through several calls, for agents' tools."""

import contextlib
import math
import os
import select
import subprocess
import time
from pathlib import Path

from r1_grading.sandbox import requirements
from r1_grading.sandbox.limits import Limits
from r1_grading.sandbox.run import SETUP_SECONDS, SandboxError, SandboxProcess, launch_sandbox

SESSION_SOURCE = (Path(__file__).parent / "inside_session.py").read_text(encoding="utf-8")
GRACE_SECONDS = 0.5
"""The time between the interruption of a cell whose time is over and its end by force."""
MAX_SOURCE_BYTES = 32 * 1024
"""Less than a pipe holds: sending a cell never blocks."""


class SessionEnded(Exception):
    """The interpreter is gone, and with it all its variables; the message names the limit."""


class PythonSession:
    """An interpreter that starts at once; `close` ends it.

    Args:
        limits: cpu_seconds limits all calls together, memory_mib the process, output_mib the output
            of one call.

    Raises:
        SandboxUnavailable: bubblewrap is missing.
        SandboxError: the sandbox does not start."""

    def __init__(self, limits: Limits) -> None:
        self._stack = contextlib.ExitStack()
        self._output_bytes = int(limits.output_mib * 2**20)
        command = (requirements.find_interpreter()[0], "-s", "-S", "-B", "-u", "-c", SESSION_SOURCE)
        with contextlib.ExitStack() as stack:
            budget = limits.program()
            self._sandbox = launch_sandbox(stack, command, budget, subprocess.PIPE, {})
            stack.enter_context(contextlib.closing(self._sandbox))
            self._start_interpreter(self._sandbox)
            self._stack = stack.pop_all()

    def run(self, source: str, seconds: float) -> str:
        """Return what a cell printed, the value of its last expression, and its error.

        Raises:
            ValueError: the source has more than `MAX_SOURCE_BYTES`.
            SessionEnded: the interpreter ended.
            Exception: any other, such as an alarm's; it ends the interpreter too.
        """
        content = f"{seconds:.3f}\n{source}".encode("utf-8", "replace")
        if len(content) > MAX_SOURCE_BYTES:
            raise ValueError(f"a cell has at most {MAX_SOURCE_BYTES:,} bytes")
        deadline = time.monotonic() + seconds + GRACE_SECONDS
        stdin = self._sandbox.process.stdin
        assert stdin is not None, "started with a pipe"
        try:
            stdin.write(len(content).to_bytes(4, "big") + content)
            size = int.from_bytes(self._read_bytes(4, deadline), "big")
            if size > self._output_bytes:
                raise SessionEnded(f"over {self._output_bytes / 2**20:g} MiB of output")
            return self._read_bytes(size, deadline).decode("utf-8", "replace")
        except BrokenPipeError:
            self.close()
            raise SessionEnded("the interpreter's process ended") from None
        except BaseException:  # the reply would be taken for that of the next cell
            self.close()
            raise

    def close(self) -> None:
        """End the interpreter. Safe to call again."""
        self._stack.close()

    def _start_interpreter(self, sandbox: SandboxProcess) -> None:
        """Wait until bubblewrap has built the sandbox, and start the interpreter."""
        poll = select.poll()
        poll.register(sandbox.status_fd, select.POLLIN)
        while sandbox.init_pidfd is None:
            if not poll.poll(SETUP_SECONDS * 1000):
                raise SandboxError("bubblewrap did not build a sandbox")
            chunk = os.read(sandbox.status_fd, 65536)
            if not chunk:
                sandbox.wait()  # raises with bubblewrap's message
                raise SandboxError("the interpreter did not start")
            sandbox.received[sandbox.status_fd] += chunk
            if b"\n" in chunk:
                sandbox.start_program()

    def _read_bytes(self, count: int, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._sandbox.stdout_fd, select.POLLIN)
        content = b""
        while len(content) < count:
            seconds = deadline - time.monotonic()
            if seconds <= 0 or not poll.poll(math.ceil(seconds * 1000)):
                raise SessionEnded("the call's time is over")
            chunk = os.read(self._sandbox.stdout_fd, count - len(content))
            if not chunk:
                raise SessionEnded("the interpreter's process ended: out of CPU time or memory")
            content += chunk
        return content
