"""The regions that the ranks of one engine need, and the deliveries that bring them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_r1.models.weights.stored.published import BLOCK, FP8_DTYPE, scale_name
from megatron_r1.models.weights.table import Shape
from megatron_r1.push.plan.tensors import Region, first_cut, scale_region
from megatron_r1.push.table import Delivery, SlotTable, dtype_of

Encoding = Literal["plain", "codes", "scales"]
"""The form of a delivery's slice: its values, or the FP8 codes or scales of its blocks."""


class ReceiverLayout:
    """The regions that the ranks of one engine need, from their tables (`PredictedLayout` has the
    same without an engine).

    Args:
        tables: the slot tables, one per rank of the engine.

    Raises:
        ValueError: for a table that has a tensor twice, which no model here needs."""

    def __init__(self, tables: Sequence[SlotTable]):
        self._tables = tables
        self.regions: dict[str, dict[Region, list[int]]] = {}
        """HF name -> region -> the ranks that need it."""
        self._slots: dict[tuple[int, str], int] = {}
        for rank, table in enumerate(tables):
            for index, slot in enumerate(table.slots):
                if (rank, slot.name) in self._slots:
                    raise ValueError(f"engine rank {rank} has two slots for {slot.name}")
                region = Region(slot.top, slot.bottom, slot.left, slot.right)
                self.regions.setdefault(slot.name, {}).setdefault(region, []).append(rank)
                self._slots[rank, slot.name] = index

    def deliveries(
        self, rank: int, name: str, shape: Shape, region: Region
    ) -> list[tuple[Delivery, Encoding]]:
        """Return a region of a tensor as a part of an engine rank's slot for it; where the slot
        holds FP8 blocks, with the delivery of their scales.

        Args:
            rank: the engine rank.
            name: HF name of the tensor.
            shape: the whole tensor's.
            region: rows and columns of the tensor.

        Raises:
            ValueError: FP8 of another kind, or a part of a block."""
        slot = self._tables[rank].slots[self._slots[rank, name]]
        if dtype_of(slot).itemsize > 1:
            return [(self._delivery(rank, name, region), "plain")]
        scales = scale_name(name)
        if slot.dtype != FP8_DTYPE or (rank, scales) not in self._slots:
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
        index = self._slots[rank, name]
        slot = self._tables[rank].slots[index]
        rows = region.top - slot.top, region.bottom - slot.top
        return Delivery(index, *rows, region.left - slot.left, region.right - slot.left)
