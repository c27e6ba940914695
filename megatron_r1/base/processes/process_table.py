"""The processes of this host as the kernel shows them: sessions, descendants, states, memory."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Self

import psutil


def session_members(leader: int) -> list[int]:
    """Return the ids of all processes in the session of process `leader`; none for 0, the number of
    a process that has not been started."""
    members = []
    for pid in psutil.pids() if leader else ():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == leader:
                members.append(pid)
    return members


def descendant_pids(pid: int) -> list[int]:
    """Return the ids of a process's children, of their children, and so on, zombies included."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def process_state(pid: int) -> str | None:
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
    """The most memory (`gib`) that the descendants of this process hold at one time within the
    block. It is in proportional shares (PSS): a page that several processes map counts once."""

    def __init__(self, every_seconds: float = 5.0):
        """Prepare the measurements.

        Args:
            every_seconds: time between two measurements. One took 90 ms for 10 GiB."""
        self.gib = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(
            target=self._track_peak_memory, args=(every_seconds,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _track_peak_memory(self, every_seconds: float) -> None:
        while not self._end.wait(every_seconds):
            num_bytes = sum(map(_proportional_bytes, descendant_pids(os.getpid())))
            self.gib = max(self.gib, num_bytes / 2**30)


def _proportional_bytes(pid: int) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).memory_full_info().pss
    return 0
