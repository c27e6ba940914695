"""A command behind a reaper: start it, show and log its output, stop it.

`python -m megatron_r1.pipeline.child COMMAND…` is the reaper: it stands between a pipeline and a
command, and kills everything the command started when it ends, or when the pipeline does. Orphans
of the command become its children (Linux: child subreaper). The kernel signals it when the
pipeline dies, by kill -9 too, and it then kills all of them. SIGTERM and SIGINT are passed on to
the command alone, so that it can end in order."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

from megatron_r1.base.processes.children import (
    die_with_parent,
    end_without_parent,
    popen_options,
    prctl,
)
from megatron_r1.base.processes.process_table import descendant_pids

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KILL_SIGNAL = signal.SIGUSR1
"""Sent by the kernel when the parent is gone, or by the parent: kill everything now."""
END_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL."""


def main(command: list[str]) -> int:
    """Return the command's exit status; 128 + N where signal N ended it."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(KILL_SIGNAL, lambda *_: _kill_all())
    end_without_parent(KILL_SIGNAL)
    try:
        child = subprocess.Popen(command, preexec_fn=die_with_parent)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    status = child.wait()
    _kill_descendants()
    return status if status >= 0 else 128 - status


def _kill_all() -> None:
    _kill_descendants()
    os._exit(128 + signal.SIGKILL)


def _kill_descendants() -> None:
    """Kill until there are none: a process may start another one before it dies."""
    while pids := descendant_pids(os.getpid()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


class StageProcess:
    """A running `command` (behind `launch`) with everything it starts; none of it outlives this
    process.

    Args:
        command: the command and its arguments.
        log: the file to which its output is appended.
        launch: the words in front of the command, such as srun and its options.
        prefix: the text after which each line of output is also printed; None: lines are not
            printed. Where it is blank and the output is a terminal, the command gets the terminal
            itself for its live view, and the log its standard error only.
        environment: variables that are set for the command."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        *,
        launch: str = "",
        prefix: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        on_terminal = prefix is not None and not prefix.strip() and sys.stdout.isatty()
        with log.open("ab") as output:
            self._log_start = output.tell()
            to_log = output if prefix is None else subprocess.PIPE
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, *shlex.split(launch), *command],
                stdout=None if on_terminal else to_log,
                stderr=subprocess.PIPE if on_terminal else subprocess.STDOUT,
                **popen_options(environment),
            )
        self._reader: threading.Thread | None = None
        if prefix is not None:
            pipe = cast(BinaryIO, self.process.stderr if on_terminal else self.process.stdout)
            target = sys.stderr.buffer if on_terminal else sys.stdout.buffer
            line_prefix = b"" if on_terminal else prefix.encode()
            self._reader = threading.Thread(
                target=_copy_output,
                args=(pipe, log, target, line_prefix),
                name="output",
                daemon=True,
            )
            self._reader.start()

    def poll(self) -> int | None:
        """Return the exit status of the command, None while it runs; 128 + N where signal N ended
        it."""
        status = self.process.poll()
        return 128 - status if status is not None and status < 0 else status

    def wait(self, seconds: float) -> int | None:
        """Wait at most `seconds` for the command to end, then return as `poll` does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            if self._reader is not None:
                self._reader.join(END_SECONDS)
        return self.poll()

    def terminate(self) -> None:
        """Send SIGTERM to the command, unless it has ended."""
        if self.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self, seconds: float = END_SECONDS) -> None:
        """Terminate the command; kill it and everything that it has started if it still runs after
        `seconds`."""
        self.terminate()
        if self.wait(seconds) is None:
            self.kill()

    def kill(self) -> None:
        """Kill the stage if it still runs, and wait for its end."""
        if self.poll() is None:
            self.process.send_signal(KILL_SIGNAL)
        self.wait(END_SECONDS)

    def output(self) -> str:
        """Return what the command has written to its log."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")


def describe_status(status: int) -> str:
    """Return `exit status 1` or `signal SIGKILL`."""
    if status > 128:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(status - 128).name}"
    return f"exit status {status}"


def _copy_output(source: BinaryIO, log: Path, target: BinaryIO, prefix: bytes) -> None:
    """Copy lines to the log and to the terminal; a terminal that is gone must not stop the work."""
    with log.open("ab") as file:
        for line in source:
            file.write(line)
            file.flush()
            with contextlib.suppress(OSError, ValueError):
                target.write(prefix + line)
                target.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
