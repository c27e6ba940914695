"""How many cores there are, and how many they are worth.

A virtual machine's two cores may be two threads of one, now and at another hour not: what should
run side by side then takes turns, and a figure that rests on it says more about the hour.
"""

from __future__ import annotations

import multiprocessing
import os
import time

import numpy as np
import xxhash

SECONDS = 0.3
BYTES = 1 << 18
"""Of one core's own cache."""


def count() -> int:
    return len(os.sched_getaffinity(0))


def worth() -> float:
    """What processes on all cores get done in the time in which one does 1; `count()` at most."""
    (alone,), all_at_once = _hashes(1), _hashes(count())
    return sum(all_at_once) / alone


def _hashes(processes: int) -> list[int]:
    """Of as many processes at once: how often each hashes its own bytes."""
    context = multiprocessing.get_context("fork")
    begin, done = context.Barrier(processes), context.SimpleQueue()
    workers = [context.Process(target=_hash, args=(begin, done)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    counts = [done.get() for _ in workers]
    for worker in workers:
        worker.join()
    return counts


def _hash(begin, done) -> None:
    values, times = np.ones(BYTES, np.uint8), 0
    begin.wait()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        xxhash.xxh3_64_intdigest(values)
        times += 1
    done.put(times)
