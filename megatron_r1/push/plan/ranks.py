"""The arrangement of the trainer's ranks and those of vLLM engines, as arithmetic.

Megatron-Core's default order is tp-cp-ep-dp-pp: ranks of dense parameters count tensor fastest,
then context, data, pipeline; ranks of experts expert-tensor fastest, then expert, expert-data,
pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatron_r1.config.parallel import ParallelConfig


@dataclass(frozen=True)
class TrainerGrid:
    """Sizes of the trainer's parallel axes over `world` ranks."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def from_recipe(cls, parallel: ParallelConfig, world: int) -> TrainerGrid:
        """Return the grid of `world` ranks under a recipe's `parallel` section. Raises UserError
        where they cannot be divided so."""
        parallel.check_sizes(world)
        axes = {"tensor", "pipeline", "context", "expert", "expert_tensor"}
        return cls(world, **parallel.model_dump(include=axes))

    @property
    def expert_model(self) -> int:
        return self.expert_tensor * self.expert

    @property
    def stage_ranks(self) -> int:
        return self.world // self.pipeline

    def dense_replicas(self, stage: int, tensor: int) -> range:
        """Return the ranks that hold the same part of a tensor-parallel parameter, in order."""
        start = stage * self.stage_ranks
        return range(start + tensor, start + self.stage_ranks, self.tensor)

    def whole_replicas(self, stage: int) -> range:
        """Return the ranks that hold a parameter that no axis splits: all of the stage."""
        return range(stage * self.stage_ranks, (stage + 1) * self.stage_ranks)

    def expert_replicas(self, stage: int, expert_tensor: int, expert: int) -> range:
        """Return the ranks that hold the same part of the same experts, in order."""
        start = stage * self.stage_ranks
        first = expert * self.expert_tensor + expert_tensor
        return range(start + first, start + self.stage_ranks, self.expert_model)


class Coordinate(NamedTuple):
    """One rank's position within its engine."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class EngineLayout:
    """The layout of `engines` engines of pipeline x data x tensor ranks each. The fields have the
    names of the recipe's keys in `rollout`, and of the argument `layout` of "connect_sets".

    expert_parallel: whether routed experts are spread whole over the data x tensor ranks of a stage
    (--enable-expert-parallel); otherwise each expert is split over them. As in vLLM, the rank
    within an engine counts tensor fastest, then pipeline, then data; global ranks count engine
    after engine."""

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
