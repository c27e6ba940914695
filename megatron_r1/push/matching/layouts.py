"""The layouts of trainer ranks (`TrainerGrid`) and of engine ranks (`EngineLayout`). No torch.

They say which ranks hold the same part of a parameter, and where a rank is on its parallel axes.

Megatron-Core's default order of trainer ranks is tp-cp-ep-dp-pp: ranks of dense parameters count
tensor fastest, then context, data, pipeline; ranks of experts expert-tensor fastest, then expert,
expert-data, pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from megatron_r1.config.parallel import ParallelConfig


@dataclass(frozen=True)
class TrainerGrid:
    """Sizes of the trainer's parallel axes, named as in the recipe's section `parallel`.

    Attributes:
        world_size: all trainer ranks.
        tensor: tensor-parallel ranks of dense parameters.
        pipeline: pipeline ranks.
        context: context-parallel ranks.
        expert: expert-parallel ranks.
        expert_tensor: tensor-parallel ranks of an expert."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def from_recipe(cls, parallel: ParallelConfig, world_size: int) -> TrainerGrid:
        """Return the grid of `world_size` ranks under a recipe's `parallel` section.

        Raises:
            UserError: the ranks cannot be divided so.
        """
        parallel.check_sizes(world_size)
        axes = {"tensor", "pipeline", "context", "expert", "expert_tensor"}
        return cls(world_size, **parallel.model_dump(include=axes))

    @property
    def expert_model(self) -> int:
        """Ranks that together hold one copy of a layer's experts."""
        return self.expert_tensor * self.expert

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: world_size / pipeline."""
        return self.world_size // self.pipeline

    def dense_replicas(self, stage: int, tensor: int) -> range:
        """Return the ranks that hold the same part of a tensor-parallel parameter, in order.

        Args:
            stage: the pipeline stage.
            tensor: the rank within its tensor-parallel group.
        """
        start = stage * self.stage_ranks
        return range(start + tensor, start + self.stage_ranks, self.tensor)

    def unsplit_replicas(self, stage: int) -> range:
        """Return the ranks that hold a parameter that no axis splits: all of the stage."""
        return range(stage * self.stage_ranks, (stage + 1) * self.stage_ranks)

    def expert_replicas(self, stage: int, expert_tensor: int, expert: int) -> range:
        """Return the ranks that hold the same part of the same experts, in order.

        Args:
            stage: the pipeline stage.
            expert_tensor: the rank within its expert-tensor-parallel group.
            expert: the rank within its expert-parallel group.
        """
        start = stage * self.stage_ranks
        first = expert * self.expert_tensor + expert_tensor
        return range(start + first, start + self.stage_ranks, self.expert_model)


class Coordinate(NamedTuple):
    """The indices of a rank on the parallel axes of its engine.

    Attributes:
        pipeline: the pipeline stage.
        data: the data-parallel rank.
        tensor: the tensor-parallel rank."""

    pipeline: int
    data: int
    tensor: int


class EngineLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The layout of `engines` engines of pipeline x data x tensor ranks each. The fields have the
    names of the recipe's keys in `rollout`, and of the argument `layout` of "connect_sets".

    As in vLLM, the rank within an engine counts tensor fastest, then pipeline, then data; global
    ranks count engine after engine.

    Attributes:
        engines: the number of engines.
        tensor_parallel: the tensor-parallel size of an engine.
        data_parallel: the data-parallel size of an engine.
        pipeline_parallel: the pipeline stages of an engine.
        expert_parallel: whether routed experts are spread whole over the data x tensor ranks of a
            stage (--enable-expert-parallel); otherwise each expert is split over them.
        redundant_experts: copies of experts of a stage, behind the model's own."""

    engines: int = 1
    tensor_parallel: int = 1
    data_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    redundant_experts: int = 0

    @property
    def ranks_per_engine(self) -> int:
        """Ranks of one engine: tensor x data x pipeline."""
        return self.tensor_parallel * self.data_parallel * self.pipeline_parallel

    @property
    def num_ranks(self) -> int:
        """Ranks of all engines, which receive a push."""
        return self.engines * self.ranks_per_engine

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate, within its engine, of global engine rank `rank`."""
        group_index, tensor = divmod(rank % self.ranks_per_engine, self.tensor_parallel)
        data, pipeline = divmod(group_index, self.pipeline_parallel)
        return Coordinate(pipeline, data, tensor)
