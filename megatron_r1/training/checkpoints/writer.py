"""Writes a checkpoint while training goes on: whole or not at all, known to every rank.

A thread per rank writes what was staged, hashing the bytes on their way; writing, syncing and
hashing leave the interpreter lock. The threads then agree over a process group of their own, so
that nothing waits for the trainer, and rank 0 gives the folder its manifest and its name.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from megatron_r1.files import fsync
from megatron_r1.training.checkpoints import manifest
from megatron_r1.training.checkpoints.files import HashedFile, write_items
from megatron_r1.training.checkpoints.finding import STATE_FILE, partial_of
from megatron_r1.training.checkpoints.host_memory import HostMemory
from megatron_r1.training.checkpoints.manifest import Entry
from megatron_r1.training.checkpoints.staging import (
    BACKEND,
    FILES_PER_RANK,
    VERSION,
    Staged,
    stage,
)

# How long the fastest rank waits for the slowest one's disk; a rank that died is noticed at once.
SLOWEST = timedelta(hours=6)


@dataclass
class Written:
    """A rank's part: its files' checksums, Megatron's results, or what went wrong."""

    rank: int
    entries: dict[str, Entry] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """Of the latest save. error: a sentence, on every rank the same. seconds: from the call to the
    name."""

    folder: Path
    is_done: bool = False
    error: str | None = None
    seconds: float = 0.0


class CheckpointWriter:
    """This rank's part in saving; every method is called on all ranks together."""

    def __init__(self, keep_memory: bool = True) -> None:
        """keep_memory: hold the buffers from one save to the next, which makes it wait less."""
        self._keep_memory = keep_memory
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._group: dist.ProcessGroup | None = None
        self._progress: Progress | None = None

    def save(
        self,
        folder: Path,
        make_tree: Callable[[HostMemory], dict[str, Any]],
        state: dict[str, Any],
    ) -> None:
        """Start to write `folder`; returns when the tensors are copied. Waits for the save before.

        make_tree: gives the sharded entries, gathered in the memory it gets. state: the
        controller's, JSON. Raises ValueError, on every rank, where the folder cannot be made or the
        save before failed.
        """
        before = self.progress(wait=True)
        if before is not None and before.error is not None:
            raise ValueError(before.error)
        began = time.perf_counter()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=SLOWEST)
        partial = partial_of(folder)
        self._agree(lambda: _make_empty(partial, folder))
        try:
            staged = stage(make_tree(self._memory), partial, self._memory)
        except OSError as error:
            raise ValueError(_sentence(folder, str(error))) from error
        self._progress = Progress(folder)
        arguments = (staged, partial, folder, state, began)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def progress(self, wait: bool) -> Progress | None:
        """How far the latest save is; None before the first. wait: until it is done."""
        if wait and self._thread is not None:
            self._thread.join()
            self._thread = None
            if not self._keep_memory:
                self._memory = HostMemory()
        return self._progress

    def _write(
        self, staged: Staged, partial: Path, folder: Path, state: dict[str, Any], began: float
    ) -> None:
        """The background thread. Whatever happens, all ranks hear of it."""
        written = Written(dist.get_rank())
        try:
            with ThreadPoolExecutor(FILES_PER_RANK) as pool:
                for name, entry, results in pool.map(_write_file(staged), staged.files):
                    written.entries[name] = entry
                    written.results.append(results)
        except Exception as error:  # the disk's, Megatron's or ours: none may be lost
            written.error = str(error) or repr(error)
        outcome = [None]
        try:
            is_first = dist.get_rank() == 0
            everyone = [None] * dist.get_world_size() if is_first else None
            dist.gather_object(written, everyone, dst=0, group=self._group)
            if is_first:
                outcome = [_finish(staged, partial, folder, state, everyone)]
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            error = outcome[0]
        except RuntimeError as lost:  # gloo's: a rank has ended
            cause = f"the ranks lost each other while they wrote: {lost}"
            error = _sentence(folder, cause, "see the logs of the others")
        self._progress = Progress(folder, True, error, time.perf_counter() - began)

    def _agree(self, on_first: Callable[[], None]) -> None:
        """Run on rank 0; raises its OSError as a ValueError on all."""
        outcome = [None]
        if dist.get_rank() == 0:
            try:
                on_first()
            except OSError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise ValueError(outcome[0])


def _make_empty(partial: Path, folder: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"checkpoint {folder} is there already: choose another folder")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(_sentence(folder, str(error))) from error


def _write_file(staged: Staged) -> Callable:
    def write(file) -> tuple[str, Entry, list[Any]]:
        with HashedFile(file.path) as stream:
            results = write_items(staged.writer, stream, file.path.name, file.items)
        return file.path.name, stream.entry, results

    return write


def _finish(
    staged: Staged, partial: Path, folder: Path, state: dict[str, Any], everyone: list[Written]
) -> str | None:
    """Rank 0's end of a save: the small files, the manifest, the name. Returns what went wrong."""
    errors = [f"rank {w.rank}: {w.error}" for w in everyone if w.error is not None]
    if not errors:
        try:
            results = [results for written in everyone for results in written.results]
            staged.writer.finish(staged.metadata, results)
            save_config(CheckpointingConfig(BACKEND, VERSION), str(partial))
            (partial / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            known = {name: entry for w in everyone for name, entry in w.entries.items()}
            for path in partial.iterdir():
                if path.name not in known:  # those are synced already
                    fsync(path)
            manifest.write(partial, known)
            partial.rename(folder)
            fsync(folder.parent)
            return None
        except Exception as error:
            errors = [f"rank 0: {error}"]
    shutil.rmtree(partial, ignore_errors=True)  # a full disk is full of this
    return _sentence(folder, "; ".join(errors[:3]))


def _sentence(folder: Path, cause: str, remedy: str = "make room, or allow writing there") -> str:
    return (
        f"checkpoint {folder} could not be written ({cause}). The checkpoints before it are "
        f"untouched; {remedy}, and run the same command again"
    )
