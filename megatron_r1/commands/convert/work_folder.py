"""An unfinished conversion: its folder, renamed to OUT at the end, and its parts.

Parts go over processes; a tensor is read in stripes that fit into memory."""

import fcntl
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write, fsync
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


_PLAN, _LOCK = ".plan.json", ".lock"


class WorkFolder:
    """The folder `OUT.incomplete`, locked by one process at a time.

    An interrupted conversion with the same plan is continued.

    Args:
        out: the folder that the finished one becomes.
        plan: source and options, as JSON.

    Raises:
        UserError: OUT exists, the folder has another plan, or another process holds it."""

    def __init__(self, out: Path, plan: dict[str, Any]):
        if out.exists():
            raise UserError(
                f"{out} exists already; remove it or give another OUT",
                key="out",
                cause=Cause.EXISTS,
            )
        self.out, self.path = out, out.with_name(out.name + ".incomplete")
        self._plan = self.path / _PLAN
        self._plan_beside = self.path.with_name(f".{self.path.name}{_PLAN}")
        if not self.path.exists():  # the plan next to it was of a folder that somebody removed
            self._plan_beside.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / _LOCK, "a")  # noqa: SIM115 - held open for the lock
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{self.path} is being written by another conversion", key="out", cause=Cause.BUSY
            ) from error
        self._check_plan(plan)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()

    def check_space(self, num_bytes: int) -> None:
        """Raise UserError unless `num_bytes`, less what is already written, are free."""
        present = sum(f.stat().st_blocks * 512 for f in self.path.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.path).free
        remainder = max(0, num_bytes - present)
        if remainder > free:
            self.abandon_empty()
            raise UserError(
                f"{self.out} needs {remainder:,} more bytes, {self.out.parent} has {free:,} free: "
                "make room or write to another disk",
                key="out",
                cause=Cause.TOO_LARGE,
            )

    def abandon_empty(self) -> None:
        """Remove the folder if no file was finished yet."""
        if not any(file.suffix in (".safetensors", ".distcp") for file in self.path.iterdir()):
            shutil.rmtree(self.path)

    def finish(self, last: Callable[[Path], None] = lambda folder: None) -> None:
        """Call `last` on the folder without its own files, then rename it to OUT. Until then the
        plan lies next to it: a conversion that is killed here is continued by the same plan."""
        self._plan.rename(self._plan_beside)
        (self.path / _LOCK).unlink()
        last(self.path)
        for path in [*self.path.rglob("*"), self.path]:
            fsync(path)
        self.path.rename(self.out)
        self._lock.close()
        fsync(self.out.parent)
        self._plan_beside.unlink()

    def _check_plan(self, plan: dict[str, Any]) -> None:
        if self._plan_beside.exists():
            self._plan_beside.rename(self._plan)
        if not self._plan.exists():
            atomic_write(self._plan, json.dumps(plan))
            return
        before = json.loads(self._plan.read_text(encoding="utf-8"))
        current = json.loads(json.dumps(plan))
        if changed := [key for key in current if before.get(key) != current[key]]:
            other_items = [
                key
                if isinstance(current[key], dict)
                else f"{key} {before.get(key)} there, {current[key]}"
                for key in changed
            ]
            raise UserError(
                f"{self.path} holds an unfinished conversion of something else "
                f"({'; '.join(other_items)} now); continue that one, or remove the folder",
                key="out",
                cause=Cause.CHANGED,
            )
