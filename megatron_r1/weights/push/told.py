"""What the ranks of an engine say they need, in the place of what is predicted of them
(`EngineNeeds`): the same questions, answered from their tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megatron_r1.landing import Delivery, Table
from megatron_r1.weights.layout import table
from megatron_r1.weights.push.engine_layout import EngineLayout, Place
from megatron_r1.weights.push.region import Region
from megatron_r1.weights.push.tensors import Tensor


class ToldNeeds:
    """Of one engine of `layout` for the model `hf` describes; tables[rank] is each rank's.

    Raises ValueError for a table that has a tensor twice, which no model here needs.
    """

    def __init__(self, hf: dict, layout: EngineLayout, tables: Sequence[Table]):
        self.layout, self.table = layout, table(hf)
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

    def delivery(self, rank: int, name: str, region: Region) -> Delivery:
        """`region` of tensor `name` as a part of the slot that engine rank `rank` has for it."""
        at = self.layout.place(rank)
        wanted = self._regions[name][at.pipeline, at.data, at.tensor]
        return Delivery(
            self._slots[rank, name],
            region.top - wanted.top,
            region.bottom - wanted.top,
            region.left - wanted.left,
            region.right - wanted.left,
        )
