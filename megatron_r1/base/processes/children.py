"""Child processes: started and stopped, so that they end with the process that started them
(`r1_grading.base.lifetime`), and as the kernel shows them: sessions, descendants, memory."""

import contextlib
import errno
import random
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from r1_grading.base.lifetime import (
    PARENT,
    Child,
    die_with_parent,
    end_without_parent,
    kill_group,
    popen_options,
    prctl,
)

__all__ = ["PARENT", "die_with_parent", "end_without_parent", "prctl"]
import os
import threading
from typing import Self

import psutil


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` with its output appended to `log`; see `popen_options`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, **popen_options(environment)
        )


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables by which torchrun names a rank of this machine.

    Args:
        rank: the process's rank.
        num_ranks: the number of ranks in all.
        port: the port of torch.distributed's store, which rank 0 hosts.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Stoppable(Child, Protocol):
    """A child process of `subprocess` or of `preloaded`."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


def stop(
    process: Stoppable, timeout_seconds: float = 10.0, kill_seconds: float | None = None
) -> None:
    """Send SIGTERM, wait, then kill the process with everything in its session's first group.

    Args:
        process: the process that leads its process group.
        timeout_seconds: how long it may take to end by itself.
        kill_seconds: the time-out of `kill`.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_seconds)
    kill(process, kill_seconds)


def kill(process: Stoppable, timeout_seconds: float | None = None) -> None:
    """Kill a process that leads its process group, and the group; harmless if it has ended.

    Args:
        process: the process that leads its process group.
        timeout_seconds: how long to wait for its end, None: until it has ended. A process inside a
            driver that hangs does not end even so.
    """
    if not process.pid:
        process.terminate()
    kill_group(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_seconds)


def free_port(host: str = "") -> int:
    """Return a TCP port that is free now, for a process that will listen on it later.

    The port is not one of those that the system gives to outgoing connections (Linux: from 32,768
    on), which could be taken by then."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(errno.EADDRINUSE, "100 ports between 20,000 and 32,000 are all taken")


def session_members(leader: int) -> list[int]:
    """Return the ids of all processes in the session of process `leader`; none for 0, the number of
    a process that has not been started."""
    members = []
    for pid in psutil.pids() if leader else ():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == leader:
                members.append(pid)
    return members


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, of their children, and so on, zombies included."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def state(pid: int) -> str | None:
    """Return a process's state in psutil's words ("running", "stopped", "disk-sleep", …), or None
    if it has ended."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


def catches_signal(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, which would otherwise end it."""
    with contextlib.suppress(OSError):  # psutil does not show SigCgt
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


class PeakMemory:
    """The most memory that the descendants of this process hold at one time within the `with`
    block: `gib`, in proportional shares (PSS), where a page that several processes map counts
    once."""

    def __init__(self, every_seconds: float = 5.0):
        """Prepare the measurements.

        Args:
            every_seconds: time between two measurements. One took 90 ms for 10 GiB."""
        self.gib = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._measure, args=(every_seconds,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _measure(self, every_seconds: float) -> None:
        while not self._end.wait(every_seconds):
            self.gib = max(self.gib, sum(map(_held, descendants(os.getpid()))) / 2**30)


def _held(pid: int) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).memory_full_info().pss
    return 0
