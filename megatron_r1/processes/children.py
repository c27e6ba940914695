"""Child processes that die with their parent and say why they died."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

from megatron_r1.processes.lifetime import die_with_parent


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start `command` with its output appended to `log`; it dies with this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C is the controller's to handle, not theirs
        )


def free_port(host: str = "") -> int:
    """A TCP port that nobody listens on, for a process that will only after a while.

    Not one of those that the system gives to outgoing connections (Linux: from 32,768 on), which
    would be taken by then.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(errno.EADDRINUSE, "100 ports between 20,000 and 32,000 are all taken")


def stop(process: subprocess.Popen, timeout_seconds: float = 10.0) -> None:
    """Ask, wait, then kill, with everything it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def kill(process: subprocess.Popen) -> None:
    """End it and everything it started at once; harmless if it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, for an error message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "(no output)"
    return "\n".join(text.strip().splitlines()[-count:]) or "(no output)"
