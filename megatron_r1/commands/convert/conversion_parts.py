"""The parts of a conversion: they go over processes, and a tensor is read in stripes that fit into
memory."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_r1.base.processes.children import die_with_parent

SECONDS_BETWEEN_LINES = 10
STRIPE_ELEMENTS = 8 << 20
"""Elements in memory at a time: 32 MiB in fp32. A step holds a few copies."""


def row_stripes(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield (first row, rows) that cover a tensor; first rows are multiples of `multiple`."""
    width = shape[1] if len(shape) > 1 else 1
    rows = max(multiple, STRIPE_ELEMENTS // max(1, width) // multiple * multiple)
    for first in range(0, shape[0], rows):
        yield first, min(rows, shape[0] - first)


def run_parts(
    work: Callable[[Any], Any], parts: Sequence[Any], workers: int, unit: str = "file"
) -> list[Any]:
    """Return [work(part) for part in parts], computed in processes with progress lines.

    Workers die with this process, so that after a kill none of them writes next to the command that
    continues.

    Args:
        work: the function of a part; picklable.
        parts: its arguments; picklable.
        workers: the number of processes; with 1, this process computes.
        unit: what a part is, in progress lines."""
    if workers == 1 or len(parts) < 2:
        _limit_threads()
        return _with_progress(map(work, parts), len(parts), unit)
    # Spawned: a forked child would share the parent's open files and threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(parts)), initializer=_start_worker) as pool:
        return _with_progress(pool.imap(work, parts), len(parts), unit)


def _with_progress(results: Iterable[Any], total: int, unit: str) -> list[Any]:
    """Return the results as a list; print a line every SECONDS_BETWEEN_LINES."""
    gathered, started_at = [], time.monotonic()
    printed = started_at
    for result in results:
        gathered.append(result)
        now = time.monotonic()
        if now - printed >= SECONDS_BETWEEN_LINES:
            printed, seconds, count = now, now - started_at, len(gathered)
            seconds_left = seconds / count * (total - count)
            print(f"  {unit} {count}/{total}, {seconds:.0f} s, {seconds_left:.0f} left", flush=True)
    return gathered


def _start_worker() -> None:
    die_with_parent()
    _limit_threads()


def _limit_threads() -> None:
    import torch

    # Workers copy and round: more threads would only compete for memory bandwidth.
    torch.set_num_threads(1)
