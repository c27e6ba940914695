"""The most memory that a command's processes hold at one time, in shares (PSS): a page that several
of them map counts once in their sum, as it does for the machine."""

import contextlib
import os
import threading
from typing import Self

import psutil

from megatron_r1.processes.inspection import descendants


class PeakMemory:
    """Measures from `with` to its end: `gib` is the largest sum found for this process's children,
    theirs, and so on, without this process itself."""

    def __init__(self, every_seconds: float = 5.0):
        """every_seconds: time between two measurements. One took 90 ms for 10 GiB."""
        self.gib = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._measure, args=(every_seconds,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()

    def _measure(self, every_seconds: float) -> None:
        while not self._end.wait(every_seconds):
            self.gib = max(self.gib, sum(map(_held, descendants(os.getpid()))) / 2**30)


def _held(pid: int) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).memory_full_info().pss
    return 0
