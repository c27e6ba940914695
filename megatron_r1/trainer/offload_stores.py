"""Stores of offloaded parameters and optimizer state: host memory, or a file on a local disk.

In host memory the bytes lie in pinned buffers that are kept for the next time. On a disk they lie
in a file without a name, which the system deletes with the process, however that ends; the file has
its whole size before anything is written, and its bytes are compared with their digest when they
come back."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models import platform

BUFFER_BYTES = 1 << 28
"""Bytes of a pinned buffer: torch pins a power of two, so larger ones would waste up to half."""


class Store(Protocol):
    """Stores the bytes of parameters, or of optimizer state, in the order given."""

    def write(self, parts: Sequence[Tensor]) -> None:
        """Copy all parts, uint8 on any device.

        Raises:
            UserError: there is no room for all; nothing has been changed then.
        """

    def read(self, parts: Sequence[Tensor]) -> None:
        """Copy what `write` was given into tensors of the same sizes.

        Raises:
            RuntimeError: the bytes are not those that were kept.
        """


class HostMemoryStore:
    """Keeps bytes in host memory, pinned where there is a GPU."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def write(self, parts: Sequence[Tensor]) -> None:
        """Copy the parts into host memory."""
        num_missing = _num_buffers(parts) - len(self._buffers)
        self._buffers += [_empty_buffer() for _ in range(num_missing)]
        for piece, offset in _buffer_pieces(parts):
            self._buffer_slice(piece, offset).copy_(piece, non_blocking=True)
        platform.synchronize()

    def read(self, parts: Sequence[Tensor]) -> None:
        """Copy what `write` stored back into parts of the same sizes."""
        for piece, offset in _buffer_pieces(parts):
            piece.copy_(self._buffer_slice(piece, offset), non_blocking=True)
        platform.synchronize()

    def _buffer_slice(self, piece: Tensor, offset: int) -> Tensor:
        start = offset % BUFFER_BYTES
        return self._buffers[offset // BUFFER_BYTES][start : start + len(piece)]


class DiskStore:
    """Keeps bytes in a file of a folder.

    Args:
        folder: exists on a local disk; None: the system's folder for temporary files."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder or tempfile.gettempdir()
        self._file: IO[bytes] | None = None
        self._digests: list[int] = []

    def write(self, parts: Sequence[Tensor]) -> None:
        """Write the parts to a file, with a digest of each piece.

        Raises:
            UserError: the disk has too little room; nothing has been changed then.
        """
        num_bytes = sum(map(len, parts))
        try:
            file = self._reserve_file(num_bytes)
            self._digests = []
            copy_buffer = _empty_buffer()
            for piece, offset in _buffer_pieces(parts):
                copied_piece = copy_buffer[: len(piece)]
                copied_piece.copy_(piece)
                self._digests.append(xxh3_64_intdigest(copied_piece.numpy().data))
                _write_content(file.fileno(), copied_piece.numpy().data, offset)
        except OSError as error:
            raise UserError(
                f"parallel.offload_folder: {self._folder} has no room for "
                f"{num_bytes / 2**30:.3g} GiB of a trainer rank ({error.strerror or error}); "
                "nothing is lost. Free that much for each rank of a node, name another folder, or "
                "set parallel.offload_between_phases to host or none",
                key="parallel.offload_folder",
                cause=Cause.TOO_LARGE,
            ) from error

    def read(self, parts: Sequence[Tensor]) -> None:
        """Read back what `write` wrote.

        Raises:
            RuntimeError: the file is short, or a piece has another digest.
        """
        assert self._file is not None, "write() comes first"
        copy_buffer, digests = _empty_buffer(), iter(self._digests)
        for piece, offset in _buffer_pieces(parts):
            stored_piece = copy_buffer[: len(piece)]
            if not _fill_buffer(self._file.fileno(), stored_piece.numpy().data, offset):
                raise RuntimeError(f"{self._folder}: the trainer's file ends before byte {offset}")
            if xxh3_64_intdigest(stored_piece.numpy().data) != next(digests):
                raise RuntimeError(
                    f"{self._folder}: bytes {offset} to {offset + len(piece)} of the trainer's "
                    "state are not those that were written: the disk is faulty"
                )
            piece.copy_(stored_piece)

    def _reserve_file(self, num_bytes: int) -> IO[bytes]:
        """Return the file, with room for `num_bytes`.

        Raises:
            OSError: there is no room.
        """
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
        if os.fstat(self._file.fileno()).st_size < num_bytes:
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        return self._file


def _write_content(file: int, content: memoryview, offset: int) -> None:
    while content:
        num_written = os.pwrite(file, content, offset)
        content, offset = content[num_written:], offset + num_written


def _fill_buffer(file: int, buffer: memoryview, offset: int) -> bool:
    """Fill `buffer` with the file's bytes from `offset`; return whether there were as many."""
    while buffer:
        num_read = os.preadv(file, [buffer], offset)
        if not num_read:
            return False
        buffer, offset = buffer[num_read:], offset + num_read
    return True


def _empty_buffer() -> Tensor:
    return platform.empty_in_host_memory((BUFFER_BYTES,), torch.uint8)


def _num_buffers(parts: Sequence[Tensor]) -> int:
    return -(-sum(map(len, parts)) // BUFFER_BYTES)


def _buffer_pieces(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Yield the parts, cut where buffers end, and the place of each piece among all bytes."""
    offset = 0
    for part in parts:
        while len(part):
            piece = part[: BUFFER_BYTES - offset % BUFFER_BYTES]
            yield piece, offset
            part, offset = part[len(piece) :], offset + len(piece)
