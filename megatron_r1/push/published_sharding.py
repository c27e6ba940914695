"""The regions of each tensor that engine ranks need, as they have published them
(`plan.predicted_sharding` predicts them)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.models.weights.formats.published_layout import (
    FP8_BLOCK_SIZE,
    FP8_DTYPE,
    scale_name,
)
from megatron_r1.models.weights.table import Shape
from megatron_r1.push.plan.tensors import Region, first_unaligned_edge, scale_region
from megatron_r1.push.protocol import SlotTable, TensorChunk, dtype_of
from megatron_r1.push.slices import Encoding


class PublishedSharding:
    """The regions that each rank of an engine needs, read from the slot tables it published
    (`PredictedSharding` has the same without an engine).

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
        """Return a region of a tensor as a part of an engine rank's slot for it; where the slot
        holds FP8 blocks, with the chunk of their scales.

        Args:
            rank: the engine rank.
            name: HF name of the tensor.
            shape: the whole tensor's.
            region: rows and columns of the tensor.

        Raises:
            ValueError: FP8 of another kind, or a part of a block."""
        slot = self._tables[rank].slots[self._slots[rank, name]]
        if dtype_of(slot).itemsize > 1:
            return [(self._chunk(rank, name, region), "plain")]
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
            (self._chunk(rank, name, region), "codes"),
            (self._chunk(rank, scales, scale_region(region)), "scales"),
        ]

    def _chunk(self, rank: int, name: str, region: Region) -> TensorChunk:
        index = self._slots[rank, name]
        slot = self._tables[rank].slots[index]
        rows = region.top - slot.top, region.bottom - slot.top
        return TensorChunk(index, *rows, region.left - slot.left, region.right - slot.left)
