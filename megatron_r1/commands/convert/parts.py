"""Divides a conversion: parts over processes, tensors into stripes that fit into memory."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_r1.base.processes.lifetime import die_with_parent

SECONDS_BETWEEN_LINES = 10
STRIPE_ELEMENTS = 8 << 20
"""Elements in memory at a time: 32 MiB in fp32, of which a step holds a few copies."""


def stripes(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (first row, rows) that cover a tensor; first rows are multiples of `multiple`."""
    width = shape[1] if len(shape) > 1 else 1
    rows = max(multiple, STRIPE_ELEMENTS // max(1, width) // multiple * multiple)
    for first in range(0, shape[0], rows):
        yield first, min(rows, shape[0] - first)


def run(
    work: Callable[[Any], Any], parts: Sequence[Any], workers: int, what: str = "file"
) -> list[Any]:
    """Return [work(part) for part in parts], computed in `workers` processes with progress lines.

    work and parts must be picklable. Workers die with this process, so that after a kill none of
    them writes next to the command that continues."""
    if workers == 1 or len(parts) < 2:
        _prepare()
        return _with_progress(map(work, parts), len(parts), what)
    # Spawned: a forked child would share the parent's open files and threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(parts)), initializer=_start_worker) as pool:
        return _with_progress(pool.imap(work, parts), len(parts), what)


def _with_progress(results: Iterable[Any], total: int, what: str) -> list[Any]:
    """Return the results as a list; print a line every SECONDS_BETWEEN_LINES."""
    found, began = [], time.monotonic()
    printed = began
    for result in results:
        found.append(result)
        now = time.monotonic()
        if now - printed >= SECONDS_BETWEEN_LINES:
            printed, seconds, done = now, now - began, len(found)
            left = seconds / done * (total - done)
            print(f"  {what} {done}/{total}, {seconds:.0f} s, {left:.0f} left", flush=True)
    return found


def _start_worker() -> None:
    die_with_parent()
    _prepare()


def _prepare() -> None:
    import torch

    # Workers copy and round: more threads would only compete for memory bandwidth.
    torch.set_num_threads(1)
