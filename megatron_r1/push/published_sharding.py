"""What each rank of an engine needs of each tensor, from the slot tables that it published."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.models.weights.formats.published_layout import (
    FP8_BLOCK_SIZE,
    FP8_DTYPE,
    scale_name,
)
from megatron_r1.models.weights.splits import Shape
from megatron_r1.push.matching.regions import Region, first_unaligned_edge, scale_region
from megatron_r1.push.parameter_regions import Encoding
from megatron_r1.push.slots import SlotTable, TensorChunk, dtype_of


class PublishedSharding:
    """The regions of each tensor that the ranks of an engine need, from the slot tables that they
    published (`matching.predicted_sharding` predicts them).

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

    def chunks(
        self, rank: int, name: str, shape: Shape, region: Region
    ) -> list[tuple[TensorChunk, Encoding]]:
        """Return the chunk of a region in an engine rank's slot; where the slot holds FP8 blocks,
        also that of their scales.

        Args:
            rank: the engine rank.
            name: HF name of the tensor.
            shape: the whole tensor's.
            region: rows and columns of the tensor.

        Raises:
            ValueError: FP8 of another kind, or a part of a block."""
        slot = self._tables[rank].slots[self._slots[rank, name]]
        if dtype_of(slot).itemsize > 1:
            return [(self._chunk_of_region(rank, name, region), "plain")]
        scales = scale_name(name)
        if slot.dtype != FP8_DTYPE or (rank, scales) not in self._slots:
            raise ValueError(
                f"engine rank {rank} needs {name} as {slot.dtype} without {scales}: weights can be "
                f"quantized during a push to FP8 in blocks of {FP8_BLOCK_SIZE} x {FP8_BLOCK_SIZE} "
                "only"
            )
        edge = first_unaligned_edge(region, shape)
        if edge is not None:
            raise ValueError(
                f"{name} {shape} is cut at {edge}, within a block of {FP8_BLOCK_SIZE} x "
                f"{FP8_BLOCK_SIZE}, "
                "which has one scale; set push.fp8: false, or fewer tensor parallel ranks"
            )
        return [
            (self._chunk_of_region(rank, name, region), "codes"),
            (self._chunk_of_region(rank, scales, scale_region(region)), "scales"),
        ]

    def _chunk_of_region(self, rank: int, name: str, region: Region) -> TensorChunk:
        index = self._slots[rank, name]
        slot = self._tables[rank].slots[index]
        rows = region.top - slot.top, region.bottom - slot.top
        return TensorChunk(index, *rows, region.left - slot.left, region.right - slot.left)
