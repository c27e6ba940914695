"""The transport of one host: trainer ranks write into memory that they share with the engine rank.

Each sender shares a progress array with the receiver: the number of the push, how many of its
bytes are written, and the checksums of the finished chunks. The receiver computes its own
checksums while the senders write, so that it finishes just after the last of them.

The memory is a file in /dev/shm whose name is removed as soon as both sides have mapped it, so that
nothing outlives them. The process that creates a file holds a lock on it until then; a file without
a lock was left by a killed process, and `remove_stale_files` removes it."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from megatron_r1.push.checksum import copy_with_checksum
from megatron_r1.push.lane_checksum import memory_fence
from megatron_r1.push.slots import TensorChunk, slot_view
from megatron_r1.push.transports.base import ChunkTensors, Receiver, Sender
from megatron_r1.push.transports.received_chunks import ReceivedChunks

SHM_FOLDER = Path("/dev/shm")
FILE_PREFIX = "megatron_r1_"
STALE_AGE_SECONDS = 60.0
POLL_SECONDS = 0.002
FOLLOW_SECONDS = 0.0001
"""Pauses between reads of the progress arrays: when idle, and while a push is under way, where 20
to 500 us make no difference."""
CLOSE_SECONDS = 60.0
"""How long `close` waits for the thread that follows, which looks after each part of a push."""
PUSH_INDEX, WRITTEN_INDEX, CHECKSUMS_INDEX = 0, 1, 2
"""Indices into a progress array (uint64): the push's number, its bytes written so far, and the
checksum of its first chunk."""


class SharedMemoryFile:
    """A file in /dev/shm of `num_bytes`, locked until it is closed; `close` also removes its name
    if the other side has not.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._is_open = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Not only sized: a write through a map into a full filesystem is a bus error.
            os.posix_fallocate(self._descriptor, 0, num_bytes)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Unlock and remove the file. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)


def remove_stale_files() -> None:
    """Remove the files that killed processes have left in /dev/shm."""
    for path in SHM_FOLDER.glob(f"{FILE_PREFIX}*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            # A new file may not be locked yet.
            if time.time() - os.fstat(file.fileno()).st_mtime > STALE_AGE_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def map_file(path: Path, num_bytes: int) -> torch.Tensor:
    """Map a file, uint8.

    Raises:
        OSError: the other side has removed the file.
    """
    path.stat()  # torch would create a file where there is none
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)


class SharedMemoryReceiver(Receiver):
    """One thread follows all senders' progress arrays."""

    _file: SharedMemoryFile | None = None

    def allocate(self) -> torch.Tensor:
        """Return the memory and set `address`, with which senders open it."""
        remove_stale_files()
        path = SHM_FOLDER / _file_name(self.rendezvous.engine, self.engine_rank)
        try:
            self._file = SharedMemoryFile(path, self.num_bytes)
        except OSError as error:
            remedy = "make it larger (mount -o remount,size=...), or set push.transport: gloo"
            if error.errno != errno.ENOSPC:
                remedy = "the engine's user must be able to create and map files there"
            raise ValueError(
                f"{path}: {error.strerror}: {self.num_bytes / 2**30:.3g} GiB are needed in "
                f"{SHM_FOLDER}; {remedy}"
            ) from error
        self.address = str(path)
        return map_file(path, self.num_bytes)

    def connect(self) -> None:
        """Map the senders' progress arrays and follow them. The names of all files go: both sides
        have mapped them by now."""
        paths = {trainer_rank: _progress_path(self, trainer_rank) for trainer_rank in self.senders}
        progress = {
            trainer_rank: np.memmap(path, np.uint64, "r") for trainer_rank, path in paths.items()
        }
        for path in paths.values():
            path.unlink()
        if self._file is not None:
            self._file.close()
        self.start_thread(self._follow_senders, progress, name="receive")

    def close(self) -> None:
        """Join the threads and remove the file of the buffers."""
        self.is_closing = True
        self.join_threads(CLOSE_SECONDS)
        if self._file is not None:
            self._file.close()

    def _follow_senders(self, progress: dict[int, np.ndarray]) -> None:
        """Check each sender's rows as they are written."""
        senders = [_SenderProgress(*item, self.received_chunks) for item in progress.items()]
        try:
            while not self.is_closing:
                # sum, not any, which would stop at the first: every sender must have its turn.
                if not sum(sender.check() for sender in senders):
                    under_way = any(sender.is_under_way for sender in senders)
                    time.sleep(FOLLOW_SECONDS if under_way else POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - raised by the push that waits
            self.received_chunks.fail(error)


class _SenderProgress:
    """What the receiver has seen of one sender's push."""

    def __init__(self, trainer_rank: int, progress: np.ndarray, received_chunks: ReceivedChunks):
        self.trainer_rank, self.progress = trainer_rank, progress
        self.received_chunks = received_chunks
        chunks = received_chunks.chunks[trainer_rank]
        self.row_bytes = [chunk.row_bytes(received_chunks.table) for chunk in chunks]
        self.ends = list(accumulate(chunk.num_bytes(received_chunks.table) for chunk in chunks))
        self.starts = [0, *self.ends[:-1]]
        self.push_number = self.index = self.seen = 0

    @property
    def is_under_way(self) -> bool:
        return bool(self.seen) and self.index < len(self.ends)

    def check(self) -> bool:
        """Check the rows written since the last call; return whether there were any."""
        push_number, num_written = int(self.progress[PUSH_INDEX]), int(self.progress[WRITTEN_INDEX])
        if push_number != self.push_number:
            # A sender sets its count to 0 before it begins another push.
            self.push_number, self.index, self.seen = push_number, 0, 0
            num_written = (
                int(self.progress[WRITTEN_INDEX])
                if int(self.progress[PUSH_INDEX]) == push_number
                else 0
            )
        if num_written <= self.seen:
            return False
        memory_fence()
        while self.index < len(self.ends) and self.ends[self.index] <= num_written:
            sent_checksum = int(self.progress[CHECKSUMS_INDEX + self.index])
            self.received_chunks.chunk_received(
                self.trainer_rank, push_number, self.index, sent_checksum
            )
            self.index += 1
        if self.index < len(self.ends) and num_written > self.starts[self.index]:
            row = (num_written - self.starts[self.index]) // self.row_bytes[self.index]
            self.received_chunks.rows_received(self.trainer_rank, push_number, self.index, row)
        self.seen = num_written
        return True


class SharedMemorySender(Sender):
    """Copies chunks to their places in the receiver's memory."""

    _progress: np.ndarray | None = None
    _file: SharedMemoryFile | None = None

    def plan(self, chunks: Sequence[TensorChunk]) -> None:
        """Map the engine's buffers and make the file in which progress is shown."""
        path = _progress_path(self, self.trainer_rank)
        self._file = SharedMemoryFile(path, 8 * (CHECKSUMS_INDEX + len(chunks)))
        self._progress = np.memmap(path, np.uint64, "r+")
        self._memory = self.map_memory()
        self._views: dict[int, list[torch.Tensor]] = {}
        super().plan(chunks)

    def map_memory(self) -> torch.Tensor:
        """Return the receiver's memory, mapped into this process."""
        return map_file(Path(self.receiver.address), self.table.num_buffers * self.table.num_bytes)

    def send(self, push_number: int, chunk_tensors: ChunkTensors) -> None:
        """Copy the chunks to their places. The progress array shows the receiver the rows that
        are written, and each chunk's checksum when all of its rows are."""
        progress = self._progress
        assert progress is not None, "plan() comes first, and close() last"
        # In this order: `_SenderProgress.check` must not take the count of the last push for this.
        progress[WRITTEN_INDEX] = 0
        progress[PUSH_INDEX] = push_number
        targets, offset = self._target_views(push_number), 0
        for index, chunk in enumerate(self.chunks):
            row_bytes = chunk.row_bytes(self.table)

            def report_rows(row: int, start: int = offset, row_bytes: int = row_bytes) -> None:
                memory_fence()
                progress[WRITTEN_INDEX] = start + row * row_bytes

            progress[CHECKSUMS_INDEX + index] = copy_with_checksum(
                targets[index], chunk_tensors[index], report_rows
            )
            memory_fence()
            progress[WRITTEN_INDEX] = offset = offset + chunk.num_bytes(self.table)

    def _target_views(self, push_number: int) -> list[torch.Tensor]:
        """Return the views that the chunks of this push fill."""
        index = push_number % self.table.num_buffers
        if index not in self._views:
            buffer = self.table.buffer(self._memory, push_number)
            slots = self.table.slots
            self._views[index] = [slot_view(buffer, slots[d.slot], d) for d in self.chunks]
        return self._views[index]

    def close(self) -> None:
        """Remove the file of progress."""
        self._progress = None
        if self._file is not None:
            self._file.close()


def _progress_path(end: Receiver | Sender, trainer_rank: int) -> Path:
    return SHM_FOLDER / f"{_file_name(end.rendezvous.engine, end.engine_rank)}_from_{trainer_rank}"


def _file_name(engine: str, rank: int) -> str:
    return f"{FILE_PREFIX}{engine.replace('/', '-')}_{rank}"
