"""Doing the parts of a conversion, in this process or in several."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1.processes.lifetime import die_with_parent

SECONDS_BETWEEN_LINES = 10


def run(
    work: Callable[[Any], Any], parts: Sequence[Any], workers: int, what: str = "file"
) -> list[Any]:
    """[work(part) for part in parts] in `workers` processes; tells how far it is.

    work and parts must be picklable. Workers die with this process, so that whoever continues
    after a kill has the files to himself.
    """
    results, progress = [], _Progress(len(parts), what)
    if workers == 1 or len(parts) < 2:
        _prepare()
        for part in parts:
            results.append(work(part))
            progress.tell(len(results))
        return results
    # Spawned: a forked child would share the parent's open files and threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(parts)), initializer=_start_worker) as pool:
        for result in pool.imap(work, parts):
            results.append(result)
            progress.tell(len(results))
    return results


class _Progress:
    """A line now and then, for what takes longer than a person waits without asking."""

    def __init__(self, total: int, what: str):
        self.total, self.what = total, what
        self.began = self.told = time.monotonic()

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES:
            return
        self.told, seconds = now, now - self.began
        left = seconds / done * (self.total - done)
        print(f"  {self.what} {done}/{self.total}, {seconds:.0f} s, {left:.0f} left", flush=True)


def _start_worker() -> None:
    die_with_parent()
    _prepare()


def _prepare() -> None:
    import torch

    # Every worker copies and rounds; more threads would only fight for the same memory.
    torch.set_num_threads(1)
