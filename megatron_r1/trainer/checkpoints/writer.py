"""Writes a checkpoint while training goes on: whole or not at all, with one outcome on all ranks.

A thread per rank writes the staged files and hashes their bytes; writing, syncing and hashing
release the interpreter lock. The threads then agree over a process group of their own, so that they
never wait for the training threads, and rank 0 writes the manifest and renames the folder."""

from __future__ import annotations

import functools
import io
import json
import os
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
from blake3 import blake3
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import fsync
from megatron_r1.base.processes import collective_timeouts
from megatron_r1.models.platform import broadcast_from_rank_zero
from megatron_r1.models.weights.export import run_on_rank_zero
from megatron_r1.trainer.checkpoints import manifest
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE, partial_path
from megatron_r1.trainer.checkpoints.checkpoint_plan import (
    BACKEND,
    FILES_PER_RANK,
    VERSION,
    StagedCheckpoint,
    StagedFile,
    stage_checkpoint,
)
from megatron_r1.trainer.checkpoints.manifest import FileEntry
from megatron_r1.trainer.checkpoints.staging import StagingBuffers
from megatron_r1.trainer.operations import CheckpointProgress


@dataclass
class WrittenFiles:
    """The result of one rank: its files' checksums and Megatron's results, or the error.

    Attributes:
        rank: its number among all ranks, from 0.
        entries: name → size and checksum of each file.
        results: Megatron's results.
        error: why the rank could not write; None: it has written."""

    rank: int
    entries: dict[str, FileEntry] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    error: str | None = None


class CheckpointWriter:
    """The part of a save that a rank does; every method is called on all ranks together."""

    def __init__(
        self, data_group: dist.ProcessGroup, keep_memory: bool, straggler_timeout: timedelta
    ) -> None:
        """Prepare to write checkpoints.

        Args:
            data_group: the data- and context-parallel ranks, which share the writing.
            keep_memory: keep the host memory between saves, which makes the next one faster.
            straggler_timeout: how long the fastest rank waits for the slowest one's disk; a rank
                that died is noticed at once."""
        self._straggler_timeout = straggler_timeout
        self._data_group, self._keep_memory = data_group, keep_memory
        self._memory = StagingBuffers()
        self._thread: threading.Thread | None = None
        self._group: dist.ProcessGroup | None = None
        self._progress: CheckpointProgress | None = None

    def save(
        self,
        folder: Path,
        make_tree: Callable[[StagingBuffers], dict[str, Any]],
        state: dict[str, Any],
    ) -> None:
        """Start to write `folder` and return when the tensors are copied; waits for the previous
        save first.

        Args:
            folder: the checkpoint's folder.
            make_tree: returns the sharded entries, gathered in the memory given.
            state: the controller's, JSON.

        Raises:
            UserError: the folder cannot be made or the previous save failed; on every rank."""
        previous_save = self.progress(wait=True)
        if previous_save is not None and previous_save["error"] is not None:
            raise UserError(previous_save["error"], key="checkpoint", cause=Cause.UNREADABLE)
        started_at = time.perf_counter()
        if self._group is None:
            # All ranks, over gloo: a group of its own, because the training threads use the others.
            self._group = dist.new_group(backend="gloo", timeout=self._straggler_timeout)
        partial_folder = partial_path(folder)
        run_on_rank_zero(lambda: _make_empty(partial_folder, folder), self._group)
        try:
            staged_checkpoint = stage_checkpoint(
                make_tree(self._memory), partial_folder, self._memory, self._data_group
            )
        except OSError as error:
            raise UserError(
                _failure_message(folder, str(error)), key="checkpoint", cause=Cause.UNREADABLE
            ) from error
        self._progress = {"is_done": False, "error": None, "seconds": 0.0}
        arguments = (staged_checkpoint, folder, state, started_at)
        self._thread = threading.Thread(target=self._write_checkpoint, args=arguments, daemon=True)
        self._thread.start()

    def progress(self, wait: bool) -> CheckpointProgress | None:
        """Return the state of the latest save, None before the first.

        Args:
            wait: whether to wait until the save is done."""
        if wait and self._thread is not None:
            self._thread.join()
            self._thread = None
            if not self._keep_memory:
                self._memory = StagingBuffers()
        return self._progress

    def _write_checkpoint(
        self, staged: StagedCheckpoint, folder: Path, state: dict[str, Any], started_at: float
    ) -> None:
        """Run in the background thread; record the same outcome on all ranks."""
        written_files = WrittenFiles(dist.get_rank())
        try:
            write = functools.partial(_write_file, staged.writer)
            with ThreadPoolExecutor(FILES_PER_RANK) as pool:
                for name, entry, results in pool.map(write, staged.files):
                    written_files.entries[name] = entry
                    written_files.results.append(results)
        except Exception as error:  # noqa: BLE001 - the disk's, Megatron's or ours, sent to rank 0
            written_files.error = str(error) or repr(error)
        try:
            is_first = dist.get_rank() == 0
            from_all: list[Any] | None = [None] * dist.get_world_size() if is_first else None
            # Over all ranks: the first one finishes with the results of all, and all learn the end.
            dist.gather_object(written_files, from_all, dst=0, group=self._group)
            outcome = (
                _finish_save(staged, folder, state, from_all) if from_all is not None else None
            )
            failure = broadcast_from_rank_zero(outcome, self._group)
        except RuntimeError as lost:  # gloo's: a rank has ended, or is late
            cause = f"the ranks lost each other while they wrote: {lost}"
            remedy = "see the logs of the others"
            if collective_timeouts.collective_wait(
                str(lost), seconds := self._straggler_timeout.total_seconds()
            ):
                remedy = collective_timeouts.timeout_remedy(seconds)
            failure = _failure_message(folder, cause, remedy)
        seconds = time.perf_counter() - started_at
        self._progress = {"is_done": True, "error": failure, "seconds": seconds}


def _make_empty(partial: Path, folder: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"checkpoint {folder} is there already: choose another folder")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(_failure_message(folder, str(error))) from error


def _write_file(
    writer: FileSystemWriterAsync, file: StagedFile
) -> tuple[str, FileEntry, list[Any]]:
    """Write the items in the format of torch's distributed checkpoint; return torch's results."""
    name, form = file.path.name, SerializationFormat.TORCH_SAVE
    with HashedFile(file.path) as out_file:
        results = [
            _write_item(writer.transforms, out_file, data, item, name, form)
            for item, data in file.items
        ]
        return name, out_file.entry(), results


class HashedFile(io.FileIO):
    """A file written from front to end and hashed; synced at the end of the `with` block."""

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self._hasher = blake3()
        self._failure: OSError | None = None

    def __exit__(self, kind: type[BaseException] | None, *error_and_traceback: object) -> None:
        try:
            if self._failure is not None:
                raise self._failure  # torch raises an error that hides this one
            if kind is None:
                os.fsync(self.fileno())
        finally:
            self.close()

    def write(self, piece: Any) -> int:
        """Write all of `piece`; a raw file may take less at a time."""
        bytes_left = memoryview(piece).cast("B")
        self._hasher.update(bytes_left)
        num_bytes = len(bytes_left)
        try:
            while bytes_left:
                bytes_left = bytes_left[super().write(bytes_left) :]
        except OSError as error:
            self._failure = self._failure or error
            raise
        return num_bytes

    def entry(self) -> FileEntry:
        """Return size and checksum of the bytes that were written, so that a later change on the
        disk is seen."""
        return FileEntry(self.tell(), self._hasher.hexdigest())


def _finish_save(
    staged: StagedCheckpoint, folder: Path, state: dict[str, Any], from_all: list[WrittenFiles]
) -> str | None:
    """Finish a save on rank 0: small files, manifest, rename. Returns the error, or None."""
    partial_folder = partial_path(folder)
    errors = [f"rank {w.rank}: {w.error}" for w in from_all if w.error is not None]
    if not errors:
        try:
            results = [results for rank_files in from_all for results in rank_files.results]
            staged.writer.finish(staged.metadata, results)
            save_config(CheckpointingConfig(BACKEND, VERSION), str(partial_folder))
            (partial_folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            entries = {name: entry for w in from_all for name, entry in w.entries.items()}
            for path in partial_folder.iterdir():
                if path.name not in entries:  # those are synced already
                    fsync(path)
            manifest.write_manifest(partial_folder, entries)
            partial_folder.rename(folder)
            fsync(folder.parent)
            return None
        except Exception as error:  # noqa: BLE001 - returned below, as those of other ranks
            errors = [f"rank 0: {error}"]
    shutil.rmtree(partial_folder, ignore_errors=True)  # a full disk is full of this
    return _failure_message(folder, "; ".join(errors[:3]))


def _failure_message(
    folder: Path, cause: str, remedy: str = "make room, or allow writing there"
) -> str:
    return (
        f"checkpoint {folder} could not be written ({cause}). The checkpoints before it are "
        f"untouched; {remedy}, and run the same command again"
    )
