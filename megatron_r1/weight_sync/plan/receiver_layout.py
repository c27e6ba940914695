"""What the ranks of an engine say they need, in the place of what is predicted of them
(`EngineNeeds`): the same questions, answered from their tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_r1.weight_sync.plan.engine_layout import EngineLayout, Place
from megatron_r1.weight_sync.plan.fp8_blocks import cut, scales_of
from megatron_r1.weight_sync.plan.plan import Transfer
from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.plan.tensors import Tensor
from megatron_r1.weight_sync.receive import Delivery, Table
from megatron_r1.weight_sync.receive.table import dtype_of
from megatron_r1.weight_sync.send.source import Form
from megatron_r1.weights.layout import table
from megatron_r1.weights.stored.fp8 import BLOCK, STORED, scale_name


class ReceiverLayout:
    """Of one engine of `layout` for the model `hf` describes; tables[rank] is each rank's.

    Raises ValueError for a table that has a tensor twice, which no model here needs.
    """

    def __init__(self, hf: dict, layout: EngineLayout, tables: Sequence[Table]):
        self.layout, self.table, self._tables = layout, table(hf), tables
        self._regions: dict[str, dict[Place, Region]] = defaultdict(dict)
        self._slots: dict[tuple[int, str], int] = {}
        for rank, told in enumerate(tables):
            at = layout.place(rank)
            for index, slot in enumerate(told.slots):
                place = (at.pipeline, at.data, at.tensor)
                if place in self._regions[slot.name]:
                    raise ValueError(f"engine rank {rank} wants {slot.name} at two places")
                self._regions[slot.name][place] = Region(
                    slot.top, slot.bottom, slot.left, slot.right
                )
                self._slots[rank, slot.name] = index

    def places(self, tensor: Tensor) -> list[Place]:
        """Who needs a part of `tensor`, in a fixed order."""
        return sorted(self._regions.get(tensor.name, ()))

    def region(self, tensor: Tensor, place: Place) -> Region | None:
        """What the rank at `place` needs of `tensor`; None for nothing."""
        return self._regions[tensor.name].get(place)

    def alike(self, tensor: Tensor) -> object:
        """Tensors with the same answer are wanted alike; here each is asked for itself."""
        return tensor.name

    def deliveries(self, rank: int, transfer: Transfer) -> list[tuple[Delivery, Form]]:
        """`transfer` as a part of the slot that engine rank `rank` has for it; with that of its
        scales, where the slot is of FP8 blocks.

        Raises ValueError for FP8 of another kind, and for parts of blocks."""
        name, region = transfer.name, transfer.region
        slot = self._tables[rank].slots[self._slots[rank, name]]
        if dtype_of(slot).itemsize > 1:
            return [(self._delivery(rank, name, region), "plain")]
        scales = scale_name(name)
        if slot.dtype != STORED or (rank, scales) not in self._slots:
            raise ValueError(
                f"engine rank {rank} wants {name} as {slot.dtype} without {scales}: only FP8 in "
                f"blocks of {BLOCK} x {BLOCK} can be made of weights on their way"
            )
        at = cut(region, transfer.shape)
        if at is not None:
            raise ValueError(
                f"{name} {transfer.shape} is cut at {at}, within a block of {BLOCK} x {BLOCK}, "
                "which has one scale; set push.fp8: false, or fewer tensor parallel ranks"
            )
        return [
            (self._delivery(rank, name, region), "codes"),
            (self._delivery(rank, scales, scales_of(region)), "scales"),
        ]

    def _delivery(self, rank: int, name: str, region: Region) -> Delivery:
        at = self.layout.place(rank)
        wanted = self._regions[name][at.pipeline, at.data, at.tensor]
        return Delivery(
            self._slots[rank, name],
            region.top - wanted.top,
            region.bottom - wanted.top,
            region.left - wanted.left,
            region.right - wanted.left,
        )
