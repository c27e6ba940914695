"""Whether a process that was killed may have been ended by the kernel for lack of memory."""

import contextlib
from pathlib import Path

COUNTERS = Path("/proc/vmstat")
"""Linux: its line oom_kill counts the processes killed since the system started, containers'
included."""


def num_kills() -> int:
    """Return the kernel's count of processes that it killed for lack of memory; 0 where it shows
    none."""
    with contextlib.suppress(OSError, ValueError):
        for line in COUNTERS.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def explanation(kills_before: int, remedy: str) -> str:
    """Return what to add to "killed by signal 9": nothing, or that memory ran out, with the remedy.

    kills_before: `num_kills` when the process started."""
    if num_kills() <= kills_before:
        return ""
    return f" (the kernel has killed a process for lack of memory since it started: {remedy})"
