"""Memory of this host, or of the container that a process runs in: what is free, and the most that
the descendants of a process have held."""

import contextlib
import os
import threading
from pathlib import Path
from typing import Self

import psutil

from megatron_r1.base.processes.process_table import descendant_pids

CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Return the memory that this host, or the container, has left."""
    available_bytes = psutil.virtual_memory().available
    try:
        limit, usage = (
            int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # another system, or no limit ("max")
        return available_bytes
    # The kernel drops cached files before it kills a process.
    cached_bytes = int(stat["active_file"]) + int(stat["inactive_file"])
    return min(available_bytes, limit - usage + cached_bytes)


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
