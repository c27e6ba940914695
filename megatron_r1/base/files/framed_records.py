"""Append-only files of framed records: damage costs only the record that it hit.

A frame is a mark, the payload's length, the first 16 bytes of BLAKE3 over length and payload, and
the payload. A kill during a write leaves a torn last frame, which is cut off before more is
appended. A flipped byte costs its own record: reading goes on at the next mark whose checksum is
right."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

# UTF-8 text has no byte 0xf5, so no text within a payload looks like a mark.
FRAME_MARK = b"\xf5mr1"
FRAME_HEADER = struct.Struct("<4sI16s")
MAX_PAYLOAD_BYTES = 2**32 - 1


def append_frame(descriptor: int, payload: bytes) -> None:
    """Write one frame at the end of an open file, without a sync.

    Raises:
        OSError: the write fails.
        ValueError: the payload has more than `MAX_PAYLOAD_BYTES`.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"a record of {len(payload):,} bytes: a frame holds at most {MAX_PAYLOAD_BYTES:,}"
        )
    for part in (FRAME_HEADER.pack(FRAME_MARK, len(payload), _frame_digest(payload)), payload):
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]


@dataclass
class FramedFile:
    """The whole records of a file at the time it was read; iterating yields their payloads, views.

    Attributes:
        spans: where each payload begins and ends in the file.
        num_damaged_bytes: bytes that belong to no whole record."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    num_damaged_bytes: int = 0
    _content: mmap.mmap | bytes = b""

    @classmethod
    def read(cls, path: Path, repair: bool = True) -> FramedFile:
        """Check every byte of a file. A missing file has no records.

        Args:
            path: the file.
            repair: cut off what follows its last whole record; False where another process may be
                writing it."""
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""
        except FileNotFoundError:
            return cls()
        spans = list(_whole_frame(content))
        end = spans[-1][1] if spans else 0
        if repair and end < size:
            os.truncate(path, end)
        framed_bytes = sum(stop - start + FRAME_HEADER.size for start, stop in spans)
        return cls(spans, size - framed_bytes, content)

    def __iter__(self) -> Iterator[memoryview]:
        content = memoryview(self._content)
        return (content[start:stop] for start, stop in self.spans)


def _whole_frame(content: mmap.mmap | bytes) -> Iterator[tuple[int, int]]:
    """Yield the span of each whole frame's payload, in order."""
    position = 0
    while (position := content.find(FRAME_MARK, position)) >= 0:
        start = position + FRAME_HEADER.size
        if start > len(content):
            return
        _, length, digest = FRAME_HEADER.unpack(content[position:start])
        stop = start + length
        if stop <= len(content) and _frame_digest(memoryview(content)[start:stop]) == digest:
            yield start, stop
            position = stop
        else:
            position += 1


def _frame_digest(payload: bytes | memoryview) -> bytes:
    return blake3(struct.pack("<I", len(payload))).update(payload).digest(length=16)
