"""Measures how long the event loop was blocked, and the memory of the process."""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from typing import Self

import psutil

BEAT_SECONDS = 0.002


class Watch:
    """A task that is due every 2 ms, and measures its delays: `async with Watch() as watch`.

    longest: seconds by which it was late at most, by phase: the longest time in which the loop ran
    other things, or waited for a core or for the interpreter's lock. late: number of times over 0.1
    s. computed: as longest, but seconds of the processor: without the waiting, which on a machine
    with other work is most of it. peak: largest VmRSS and RssAnon, bytes; the latter without pages
    of files."""

    def __init__(self) -> None:
        self.phase = ""
        self.longest: defaultdict[str, float] = defaultdict(float)
        self.late: Counter[str] = Counter()
        self.computed: defaultdict[str, float] = defaultdict(float)
        self.peak: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _beat(self) -> None:
        read = 0.0
        while True:
            began, used, phase = time.perf_counter(), time.thread_time(), self.phase
            await asyncio.sleep(BEAT_SECONDS)
            late = time.perf_counter() - began - BEAT_SECONDS
            self.longest[phase] = max(self.longest[phase], late)
            self.late[phase] += late > 0.1
            self.computed[phase] = max(self.computed[phase], time.thread_time() - used)
            if began - read > 0.05:
                read = began
                for name, value in memory().items():
                    self.peak[name] = max(self.peak[name], value)


def memory() -> dict[str, int]:
    held = psutil.Process().memory_info()
    return {"VmRSS": held.rss, "RssAnon": held.rss - held.shared}
