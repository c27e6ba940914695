"""One file of a checkpoint, hashed as it is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron_r1.training.checkpoints.manifest import Entry


class HashedFile:
    """A file for writing from front to end; synced and closed by the `with` block.

    `entry` is of the bytes that were to be written: what a disk makes of them shows on loading.
    """

    def __init__(self, path: Path):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._hasher = blake3()
        self._position = 0
        self._failure: OSError | None = None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if self._failure is not None:
                raise self._failure  # torch tells of its own confusion instead
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def entry(self) -> Entry:
        return Entry(self._position, self._hasher.hexdigest())

    def write(self, piece) -> int:
        """All of `piece`: a raw file may take less at a time."""
        left = memoryview(piece).cast("B")
        self._hasher.update(left)
        count = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._failure = self._failure or error
            raise
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        pass


def write_items(
    writer: FileSystemWriterAsync,
    stream: HashedFile,
    name: str,
    items: Sequence[tuple[Any, Any]],
) -> list[Any]:
    """Append Megatron's items as torch's distributed checkpoint has them; its results."""
    form = SerializationFormat.TORCH_SAVE
    return [_write_item(writer.transforms, stream, data, item, name, form) for item, data in items]
