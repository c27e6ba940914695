"""What the trainer and the engines publish to each other in the store, before the first push.

Each engine rank publishes a `SlotTable` of the tensors that it needs, the trainer a `PublishedPlan`
of what each engine rank receives, over NCCL with its sends and receives of every round."""

from typing import NamedTuple

import msgspec
import torch


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """A region of an HF tensor (`plan.regions.Region`) with its place in the receive buffer.

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


class ReceiverInfo(NamedTuple):
    """What an engine rank publishes of its receiver.

    Attributes:
        table: the tensors that it needs.
        address: where its transport receives."""

    table: SlotTable
    address: str = ""


class RelaySource(NamedTuple):
    """Another engine of the set as the source of chunks: its equal rank got them from trainer ranks
    and relays them.

    Attributes:
        member: that engine, by its number in the set."""

    member: int

    def __str__(self) -> str:
        return f"- (through engine {self.member} of the set)"


EngineRankChunks = list[list[tuple[int, list[TensorChunk]]]]
"""plan[member]: the pairs (trainer rank, chunks) of what one rank of that engine gets from trainer
ranks."""


class PublishedTransfer(msgspec.Struct, frozen=True, array_like=True):
    """A send or a receive of a round: bucket `number` of the `count` of a payload.

    Attributes:
        peer: rank in the communicator.
        source: the trainer rank that sends it, or -1 - member where a member of the set relays
            it.
        number: the bucket of the payload, from 0.
        count: buckets of that payload.
    """

    peer: int
    source: int
    number: int
    count: int


class RankRounds(msgspec.Struct, frozen=True):
    """The part of an engine rank in a push over NCCL: (send, receive) of each of its rounds.

    Attributes:
        rank: the rank in the set's communicator.
        num_ranks: the size of that communicator.
        rank_ids: the equal ranks of all engines that are in it, each "member/engine rank".
        scatter: the rounds in which trainer ranks send.
        relay: the rounds in which engine ranks relay."""

    rank: int
    num_ranks: int
    rank_ids: list[str]
    scatter: list[tuple[PublishedTransfer | None, PublishedTransfer | None]]
    relay: list[tuple[PublishedTransfer | None, PublishedTransfer | None]]


class PublishedPlan(msgspec.Struct, frozen=True):
    """What equal ranks of a set's engines do in a push.

    Attributes:
        from_trainers: the chunks that each gets from trainer ranks.
        rounds: over NCCL, the rounds by member; None for a rank for which the trainer rank on its
            GPU receives."""

    from_trainers: EngineRankChunks
    rounds: list[RankRounds | None] | None = None


def chunks_to(plan: EngineRankChunks, member: int) -> dict[int | RelaySource, list[TensorChunk]]:
    """Return the chunks to one member's rank by source: from trainer ranks, then those that other
    members relay."""
    chunks: dict[int | RelaySource, list[TensorChunk]] = dict(plan[member])
    for relay, senders in enumerate(plan):
        relayed_chunks = [chunk for _, sent in senders for chunk in sent]
        if relay != member and relayed_chunks:
            # By slot: all members list what one relays in the same order.
            chunks[RelaySource(relay)] = sorted(relayed_chunks, key=lambda chunk: chunk.slot)
    return chunks
