"""How the ranks of vLLM engines are arranged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Coordinate(NamedTuple):
    """One rank's position within its engine."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class EngineLayout:
    """`engines` engines of pipeline x data x tensor ranks each.

    expert_parallel: whether routed experts are spread whole over the data x tensor ranks of a stage
    (--enable-expert-parallel); otherwise each expert is split over them. As in vLLM, the rank
    within an engine counts tensor fastest, then pipeline, then data; global ranks count engine
    after engine.
    """

    engines: int = 1
    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    expert_parallel: bool = False

    @property
    def ranks_per_engine(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def num_ranks(self) -> int:
        return self.engines * self.ranks_per_engine

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate, within its engine, of global engine rank `rank`."""
        within, tensor = divmod(rank % self.ranks_per_engine, self.tensor)
        data, pipeline = divmod(within, self.pipeline)
        return Coordinate(pipeline, data, tensor)

    def rank(self, at: Coordinate, engine: int = 0) -> int:
        """Return the global rank at `at` of engine `engine`."""
        within = (at.data * self.pipeline + at.pipeline) * self.tensor + at.tensor
        return engine * self.ranks_per_engine + within
