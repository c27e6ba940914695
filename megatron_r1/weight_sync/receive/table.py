"""What an engine rank wants and where, and what a trainer rank brings of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import torch


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """Rows [top, bottom) and columns [left, right) of HF tensor `name`; a vector is one column.

    offset: byte of its first element in the memory; pitch: bytes from one row to the next. dtype:
    the engine's, such as "bfloat16". window: 0 where all weights fit into the memory at once; else
    the memory is filled anew for every window, in turn.
    """

    name: str
    top: int
    bottom: int
    left: int
    right: int
    offset: int
    pitch: int
    dtype: str
    window: int = 0

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left


class Table(msgspec.Struct, frozen=True):
    """All slots of one engine rank, by window and then in checkpoint order.

    num_bytes: of one area. areas: 1, or 2 where the engine computes with what landed as it lies, so
    that the next push has to land beside it.
    """

    num_bytes: int
    slots: list[Slot]
    areas: int = 1

    def area(self, memory: torch.Tensor, push: int) -> torch.Tensor:
        """The part of `memory` (areas x num_bytes bytes) where this push lands."""
        start = push % self.areas * self.num_bytes
        return memory[start : start + self.num_bytes]

    @property
    def num_windows(self) -> int:
        return self.slots[-1].window + 1

    @property
    def payload_bytes(self) -> int:
        """What one push brings to this rank."""
        return sum(s.height * s.width * dtype_of(s).itemsize for s in self.slots)


class Delivery(msgspec.Struct, frozen=True, array_like=True):
    """Rows [top, bottom) and columns [left, right), counted from the slot's own corner, of
    `table.slots[slot]`."""

    slot: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def size(self) -> int:
        """Elements."""
        return self.height * (self.right - self.left)

    def row_bytes(self, table: Table) -> int:
        return (self.right - self.left) * dtype_of(table.slots[self.slot]).itemsize

    def num_bytes(self, table: Table) -> int:
        return self.height * self.row_bytes(table)


def by_window(table: Table, deliveries: Sequence[Delivery]) -> list[list[int]]:
    """The indices of the deliveries of each window."""
    found: list[list[int]] = [[] for _ in range(table.num_windows)]
    for index, delivery in enumerate(deliveries):
        found[table.slots[delivery.slot].window].append(index)
    return found


def dtype_of(slot: Slot) -> torch.dtype:
    return getattr(torch, slot.dtype)


def by_rows(height: int, row_size: int, most: int) -> Iterator[slice]:
    """All rows in turn, as many at once as are `most` of what a row has `row_size` of; at least
    one."""
    rows = max(1, most // row_size)
    for first in range(0, height, rows):
        yield slice(first, min(first + rows, height))


def place(memory: torch.Tensor, slot: Slot, part: Delivery | None = None) -> torch.Tensor:
    """The (height, width) view of `memory`, a vector of bytes, where the slot or a part of it
    lies."""
    dtype = dtype_of(slot)
    size = dtype.itemsize
    top, bottom, left, right = (
        (part.top, part.bottom, part.left, part.right) if part else (0, slot.height, 0, slot.width)
    )
    start = (slot.offset + top * slot.pitch) // size + left
    shape = (bottom - top, right - left)
    elements = memory.view(dtype)[start:]  # as_strided would count from where the storage begins
    return elements.as_strided(shape, (slot.pitch // size, 1), elements.storage_offset())
