"""What the trainer and the engines publish to each other in the store, before the first push: each
engine rank a `SlotTable` of the tensors that it needs, the trainer a `PublishedPlan` of what each
engine rank receives, over NCCL with its sends and receives of every round."""

from typing import NamedTuple

import msgspec
import torch


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """Rows [top, bottom) and columns [left, right) of HF tensor `name`; a vector is one column.

    Attributes:
        name: the tensor's name in the checkpoint.
        top: the first row.
        bottom: the row after the last one.
        left: the first column.
        right: the column after the last one.
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

    def buffer(self, memory: torch.Tensor, push: int) -> torch.Tensor:
        """Return the receive buffer that this push fills.

        Args:
            memory: uint8, num_buffers x num_bytes bytes.
            push: its number, from 1.
        """
        start = push % self.num_buffers * self.num_bytes
        return memory[start : start + self.num_bytes]


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
        """Rows of the delivery."""
        return self.bottom - self.top

    @property
    def num_elements(self) -> int:
        """Elements of the delivery."""
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


def slot_view(memory: torch.Tensor, slot: Slot, delivery: Delivery | None = None) -> torch.Tensor:
    """Return the view (height, width) of a slot, or of a delivery into it, in a vector of bytes."""
    dtype = dtype_of(slot)
    size = dtype.itemsize
    top, bottom, left, right = (
        (delivery.top, delivery.bottom, delivery.left, delivery.right)
        if delivery
        else (0, slot.height, 0, slot.width)
    )
    start = (slot.offset + top * slot.pitch) // size + left
    shape = (bottom - top, right - left)
    elements = memory.view(dtype)[start:]  # as_strided would count from the storage's beginning
    return elements.as_strided(shape, (slot.pitch // size, 1), elements.storage_offset())


class ReceiverInfo(NamedTuple):
    """An engine rank's table, and the address at which its transport receives."""

    table: SlotTable
    address: str = ""


class Relay(NamedTuple):
    """Another engine of the set as the source of deliveries: its rank at the same position got them
    from trainer ranks and relays them."""

    member: int

    def __str__(self) -> str:
        return f"- (through engine {self.member} of the set)"


PositionPlan = list[list[tuple[int, list[Delivery]]]]
"""plan[member]: the pairs (sender, deliveries) that enter that engine's rank at one position."""


class RankCall(msgspec.Struct, frozen=True, array_like=True):
    """A send or a receive of a round: bucket `number` of the `count` of a payload.

    Attributes:
        peer: rank in the communicator.
        payload: the trainer rank that sends it, or -1 - member where a member of the set relays
            it.
        number: the bucket of the payload, from 0.
        count: buckets of that payload.
    """

    peer: int
    payload: int
    number: int
    count: int


class RankRounds(msgspec.Struct, frozen=True):
    """The part of an engine rank in a push over NCCL: (send, receive) of each of its rounds, at
    first those in which weights enter it, then those in which they are relayed.

    Attributes:
        rank: the rank in the set's communicator.
        num_ranks: the number of that communicator's ranks.
        names: the ranks of its position that are in it, each "member/rank".
        entering: the rounds in which weights enter this rank.
        relayed: the rounds in which they are relayed."""

    rank: int
    num_ranks: int
    names: list[str]
    entering: list[tuple[RankCall | None, RankCall | None]]
    relayed: list[tuple[RankCall | None, RankCall | None]]


class PublishedPlan(msgspec.Struct, frozen=True):
    """What the ranks at a position do in a push.

    Attributes:
        entering: the deliveries from trainer ranks.
        rounds: over NCCL, the rounds by member; None for a rank for which the trainer rank on its
            GPU receives."""

    entering: PositionPlan
    rounds: list[RankRounds | None] | None = None


def deliveries_to(plan: PositionPlan, own: int) -> dict[int | Relay, list[Delivery]]:
    """Return the deliveries to one member of a position: those that enter it, by sender, then those
    that others relay to it."""
    deliveries: dict[int | Relay, list[Delivery]] = dict(plan[own])
    for member, senders in enumerate(plan):
        entered = [delivery for _, sent in senders for delivery in sent]
        if member != own and entered:
            # By slot: all members list what enters one in the same order.
            deliveries[Relay(member)] = sorted(entered, key=lambda delivery: delivery.slot)
    return deliveries
