"""The machine that is measured: its name, its packages, how many cores and how much they are worth.

Two cores of a virtual machine may be two threads of one physical core, and this changes from hour
to hour. Processes that should run side by side then take turns, so figures of parallel work are
printed next to `cores_worth()`."""

import multiprocessing
import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import xxhash

SECONDS = 0.3
NUM_BYTES = 1 << 18
"""Fits one core's own cache."""


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def cores_worth() -> float:
    """Return the work that processes on all cores do in the time one alone does 1."""
    (alone,), all_at_once = _hash_counts(1), _hash_counts(num_cores())
    return sum(all_at_once) / alone


def processor() -> str:
    """Return the processor's model name, or the architecture where Linux does not give it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else f"{platform.machine()} CPU"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return each package's version, or "not installed"."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hash_counts(num_processes: int) -> list[int]:
    """Return how often each of `num_processes` simultaneous processes hashes its own bytes."""
    context = multiprocessing.get_context("fork")
    begin, counts = context.Barrier(num_processes), context.SimpleQueue()
    workers = [context.Process(target=_hash, args=(begin, counts)) for _ in range(num_processes)]
    for worker in workers:
        worker.start()
    found = [counts.get() for _ in workers]
    for worker in workers:
        worker.join()
    return found


def _hash(begin, counts) -> None:
    values, count = b"\1" * NUM_BYTES, 0
    begin.wait()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        xxhash.xxh3_64_intdigest(values)
        count += 1
    counts.put(count)
