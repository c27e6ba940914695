"""The part of every Hugging Face tensor that each rank of a vLLM engine needs, from its ranks'
tables (`PredictedLayout` gives the same without an engine)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from megatron_r1.weight_sync.plan.ranks import Coordinate, EngineLayout
from megatron_r1.weight_sync.plan.tensors import HFTensor, Region, first_cut, scale_region
from megatron_r1.weight_sync.table import Delivery, SlotTable, dtype_of
from megatron_r1.weights.decoder import table
from megatron_r1.weights.rules import Shape
from megatron_r1.weights.stored.fp8 import BLOCK, STORED, scale_name

Encoding = Literal["plain", "codes", "scales"]
"""The form of a delivery's slice: its values, or the FP8 codes or scales of its blocks."""


class ReceiverLayout:
    """The regions that the ranks of one engine of `layout` need of the model `hf` describes.

    tables: one per rank of the engine. Raises ValueError for a table that has a tensor twice, which
    no model here needs."""

    def __init__(self, hf: dict, layout: EngineLayout, tables: Sequence[SlotTable]):
        self.layout, self.table, self._tables = layout, table(hf), tables
        self._regions: dict[str, dict[Coordinate, Region]] = defaultdict(dict)
        self._slots: dict[tuple[int, str], int] = {}
        for rank, rank_table in enumerate(tables):
            coordinate = layout.coordinate(rank)
            for index, slot in enumerate(rank_table.slots):
                if coordinate in self._regions[slot.name]:
                    raise ValueError(f"engine rank {rank} has two slots for {slot.name}")
                region = Region(slot.top, slot.bottom, slot.left, slot.right)
                self._regions[slot.name][coordinate] = region
                self._slots[rank, slot.name] = index

    def coordinates(self, tensor: HFTensor) -> list[Coordinate]:
        """Return the coordinates that need a part of `tensor`, in a fixed order."""
        return sorted(self._regions.get(tensor.name, ()))

    def region(self, tensor: HFTensor, coordinate: Coordinate) -> Region | None:
        """Return the region of `tensor` that the rank at `coordinate` needs, or None."""
        return self._regions[tensor.name].get(coordinate)

    def cache_key(self, tensor: HFTensor) -> None:
        """Return None: each tensor has its own entries in the tables."""

    def deliveries(
        self, rank: int, name: str, shape: Shape, region: Region
    ) -> list[tuple[Delivery, Encoding]]:
        """Return the region of the tensor `name`, of `shape`, as a part of engine rank `rank`'s
        slot for it; where the slot holds FP8 blocks, with the delivery of their scales.

        Raises ValueError for FP8 of another kind, and for parts of blocks."""
        slot = self._tables[rank].slots[self._slots[rank, name]]
        if dtype_of(slot).itemsize > 1:
            return [(self._delivery(rank, name, region), "plain")]
        scales = scale_name(name)
        if slot.dtype != STORED or (rank, scales) not in self._slots:
            raise ValueError(
                f"engine rank {rank} needs {name} as {slot.dtype} without {scales}: weights can be "
                f"quantized during a push to FP8 in blocks of {BLOCK} x {BLOCK} only"
            )
        cut = first_cut(region, shape)
        if cut is not None:
            raise ValueError(
                f"{name} {shape} is cut at {cut}, within a block of {BLOCK} x {BLOCK}, "
                "which has one scale; set push.fp8: false, or fewer tensor parallel ranks"
            )
        return [
            (self._delivery(rank, name, region), "codes"),
            (self._delivery(rank, scales, scale_region(region)), "scales"),
        ]

    def _delivery(self, rank: int, name: str, region: Region) -> Delivery:
        slot = self._regions[name][self.layout.coordinate(rank)]
        return Delivery(
            slot=self._slots[rank, name],
            top=region.top - slot.top,
            bottom=region.bottom - slot.top,
            left=region.left - slot.left,
            right=region.right - slot.left,
        )
