"""A command under a keeper: started, its output shown and logged, stopped."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from megatron_r1.processes.children import popen_options
from megatron_r1.workflow import reaper

END_SECONDS = 10.0
"""A command that was told to end twice has this long."""


class Child:
    """`command` (behind `launch`) with everything it starts; none of it outlives this process.

    shown_as: print its lines, too, each after this. Where that is blank, a command on a terminal
    gets the terminal itself for its live view, and the log only what it says on standard error.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        *,
        launch: str = "",
        shown_as: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        show = shown_as is not None
        on_terminal = show and not shown_as.strip() and sys.stdout.isatty()
        with log.open("ab") as output:
            self._log_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", reaper.__name__, *shlex.split(launch), *command],
                stdout=None if on_terminal else subprocess.PIPE if show else output,
                stderr=subprocess.PIPE if on_terminal else subprocess.STDOUT,
                **popen_options(environment),
            )
        shown = self.process.stderr if on_terminal else self.process.stdout
        self._reader: threading.Thread | None = None
        if shown is not None:
            target = sys.stderr.buffer if on_terminal else sys.stdout.buffer
            prefix = b"" if on_terminal else shown_as.encode()
            self._reader = threading.Thread(
                target=_copy, args=(shown, log, target, prefix), name="output", daemon=True
            )
            self._reader.start()

    def poll(self) -> int | None:
        """Its exit status, None while it runs; 128 + N where signal N ended it."""
        status = self.process.poll()
        return 128 - status if status is not None and status < 0 else status

    def wait(self, seconds: float) -> int | None:
        """As `poll`, after at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            if self._reader is not None:
                self._reader.join(END_SECONDS)
        return self.poll()

    def ask_to_end(self) -> None:
        if self.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def end(self, seconds: float = END_SECONDS) -> None:
        """Ask, wait, then kill it with everything under it; harmless if it has ended."""
        self.ask_to_end()
        if self.wait(seconds) is None:
            self.kill()

    def kill(self) -> None:
        if self.poll() is None:
            self.process.send_signal(reaper.KILL)
        self.wait(END_SECONDS)

    def said(self) -> str:
        """What it wrote to its log."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")


def describe_status(status: int) -> str:
    """`exit status 1`, `signal SIGKILL`."""
    if status > 128:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(status - 128).name}"
    return f"exit status {status}"


def _copy(source: BinaryIO, log: Path, target: BinaryIO, prefix: bytes) -> None:
    """Line by line to the log and to the terminal, whose going away must not stop the work."""
    with log.open("ab") as file:
        for line in source:
            file.write(line)
            file.flush()
            with contextlib.suppress(OSError, ValueError):
                target.write(prefix + line)
                target.flush()
