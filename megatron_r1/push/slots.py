"""Where pushed tensors are in an engine rank's receive buffer: `SlotTable` and its slots, and the
chunks of slots that trainer ranks send."""

import msgspec
import torch


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """A region of an HF tensor (`matching.regions.Region`) with its place in the receive buffer.

    Attributes:
        name: the tensor's name in the checkpoint.
        offset: byte of its first element in the memory.
        pitch: bytes from one row to the next.
        dtype: the engine's, such as "bfloat16".
    """

    name: str
    top: int
    bottom: int
    left: int
    right: int
    offset: int
    pitch: int
    dtype: str

    @property
    def height(self) -> int:
        """Rows of the slot."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns of the slot."""
        return self.right - self.left


class SlotTable(msgspec.Struct, frozen=True):
    """All slots of one engine rank, in checkpoint order.

    Attributes:
        num_bytes: the size of one receive buffer.
        slots: the regions that the rank needs, with offsets in bytes from the start of a buffer.
        num_buffers: 1 receive buffer, or 2 where the engine computes with the received weights in
            place, so that the next push must be written next to these weights."""

    num_bytes: int
    slots: list[Slot]
    num_buffers: int = 1

    def buffer(self, memory: torch.Tensor, push_number: int) -> torch.Tensor:
        """Return the receive buffer that this push fills.

        Args:
            memory: uint8, num_buffers x num_bytes bytes.
            push_number: which push of the run, from 1.
        """
        start = push_number % self.num_buffers * self.num_bytes
        return memory[start : start + self.num_bytes]


class TensorChunk(msgspec.Struct, frozen=True, array_like=True):
    """The part of a slot that one trainer rank sends, its rows and columns as in `Region`, counted
    from the slot's own corner.

    Attributes:
        slot: index into `SlotTable.slots`."""

    slot: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        """Rows of the chunk."""
        return self.bottom - self.top

    @property
    def num_elements(self) -> int:
        """Elements of the chunk."""
        return self.height * (self.right - self.left)

    def row_bytes(self, table: SlotTable) -> int:
        """Return the bytes of one row, in the dtype of its slot."""
        return (self.right - self.left) * dtype_of(table.slots[self.slot]).itemsize

    def num_bytes(self, table: SlotTable) -> int:
        """Return the bytes of all rows in the slot's dtype."""
        return self.height * self.row_bytes(table)


def dtype_of(slot: Slot) -> torch.dtype:
    """Return the dtype that a slot names."""
    return getattr(torch, slot.dtype)


def slot_view(memory: torch.Tensor, slot: Slot, chunk: TensorChunk | None = None) -> torch.Tensor:
    """Return the view (height, width) of a slot, or of a chunk of it, in the slot's dtype.

    Args:
        memory: uint8, a receive buffer.
        slot: an entry of the buffer's table.
        chunk: which part of it; None: all."""
    dtype = dtype_of(slot)
    size = dtype.itemsize
    top, bottom, left, right = (
        (chunk.top, chunk.bottom, chunk.left, chunk.right)
        if chunk
        else (0, slot.height, 0, slot.width)
    )
    start = (slot.offset + top * slot.pitch) // size + left
    shape = (bottom - top, right - left)
    elements = memory.view(dtype)[start:]  # as_strided would count from the storage's beginning
    return elements.as_strided(shape, (slot.pitch // size, 1), elements.storage_offset())
