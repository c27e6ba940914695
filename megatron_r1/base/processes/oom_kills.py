"""Whether the kernel has killed a process for lack of memory, to explain an end by signal 9."""

import contextlib
from pathlib import Path

OOM_COUNTERS = Path("/proc/vmstat")
"""Linux: its line oom_kill counts the processes killed since the system started, containers'
included."""


def num_oom_kills() -> int:
    """Return the kernel's count of processes that it killed for lack of memory; 0 where it shows
    none."""
    with contextlib.suppress(OSError, ValueError):
        for line in OOM_COUNTERS.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def oom_explanation(kills_before: int, remedy: str) -> str:
    """Return what to add to "killed by signal 9": nothing, or that memory ran out, with the remedy.

    Args:
        kills_before: `num_oom_kills` when the process started.
        remedy: what to do about it.
    """
    if num_oom_kills() <= kills_before:
        return ""
    return f" (the kernel has killed a process for lack of memory since it started: {remedy})"
