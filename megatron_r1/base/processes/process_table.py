"""The processes of this host as the kernel shows them: sessions, descendants, states, handlers."""

import contextlib
import os
from pathlib import Path

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
