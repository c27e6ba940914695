"""The regions of each tensor that trainer ranks hold and that engine ranks need, from which
`engine_sets` makes the plan. No torch.

Trainer ranks: Megatron-Core's default order is tp-cp-ep-dp-pp: ranks of dense parameters count
tensor fastest, then context, data, pipeline; ranks of experts expert-tensor fastest, then expert,
expert-data, pipeline.

Engine ranks (`PredictedSharding`, before any engine runs): the weight table that lays a model out
over Megatron's ranks also determines how vLLM splits it: each split of `models.weights.table` has
a counterpart here. vLLM 0.32's classes:

    column_parallel   ColumnParallelLinear, MergedColumnParallelLinear
    row_parallel      RowParallelLinear
    whole             ReplicatedLinear, norms
    vocab_parallel    VocabParallelEmbedding, ParallelLMHead
    QueryGroups       QKVParallelLinear

Routed experts are FusedMoE's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import model_family, padded_vocabulary
from megatron_r1.models.weights.layout import Shard, stage_shards
from megatron_r1.models.weights.table import (
    QueryGroups,
    Shape,
    WeightTable,
    column_parallel,
    replicated,
    replicated_stack,
    row_parallel,
    vocab_parallel,
    weight_table,
)
from megatron_r1.push.plan.tensors import HFTensor, Region, checkpoint_tensors, is_tied

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


@dataclass(frozen=True)
class EngineLayout:
    """The layout of `engines` engines of pipeline x data x tensor ranks each. The fields have the
    names of the recipe's keys in `rollout`, and of the argument `layout` of "connect_sets".

    As in vLLM, the rank within an engine counts tensor fastest, then pipeline, then data; global
    ranks count engine after engine.

    Attributes:
        engines: the number of engines.
        tensor: the tensor-parallel size of an engine.
        data: the data-parallel size of an engine.
        pipeline: the pipeline stages of an engine.
        expert_parallel: whether routed experts are spread whole over the data x tensor ranks of a
            stage (--enable-expert-parallel); otherwise each expert is split over them.
        redundant_experts: copies of experts of a stage, behind the model's own."""

    engines: int = 1
    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    expert_parallel: bool = False
    redundant_experts: int = 0

    @property
    def ranks_per_engine(self) -> int:
        """Ranks of one engine: tensor x data x pipeline."""
        return self.tensor * self.data * self.pipeline

    @property
    def num_ranks(self) -> int:
        """Ranks of all engines, which receive a push."""
        return self.engines * self.ranks_per_engine

    def coordinate(self, rank: int) -> Coordinate:
        """Return the coordinate, within its engine, of global engine rank `rank`."""
        within, tensor = divmod(rank % self.ranks_per_engine, self.tensor)
        data, pipeline = divmod(within, self.pipeline)
        return Coordinate(pipeline, data, tensor)


DRAFTER_REPLICATED = ".eh_proj.weight"
"""The end of a tensor's name: vLLM's drafter has this plain linear layer on every rank, where
Megatron splits it."""

SHARED_EXPERTS = ".shared_experts."


class PredictedSharding:
    """The regions that the ranks of one engine need of the model that `hf` describes.

    A plan is made of this where no engine runs; a push is planned with `PublishedSharding`.
    `replicates_shared_experts` says whether every tensor rank has the shared experts whole.

    Args:
        hf: the model's `config.json`.
        layout: the layout of all engines.
        drafts: whether the engine drafts with the MTP layers, on its last stage, and so needs them.

    Raises:
        UserError: where vLLM cannot split the model so.
    """

    def __init__(self, hf: dict, layout: EngineLayout, *, drafts: bool = False):
        self.layout, self.table = layout, weight_table(hf)
        heads = hf["num_attention_heads"]
        if heads % layout.tensor:
            raise UserError(
                f"rollout.tensor={layout.tensor} does not divide num_attention_heads={heads}; "
                f"choose a divisor of {heads}",
                key="rollout.tensor",
                cause=Cause.INDIVISIBLE,
            )
        self._stage_layers = stage_layers(len(self.table.layers), layout.pipeline)
        if drafts:
            start, end = self._stage_layers[-1].start, len(self.table.layers + self.table.mtp)
            self._stage_layers[-1] = range(start, end)
        on_last_stage = is_tied(self.table) or drafts
        self._embedding_stages = sorted({0, layout.pipeline - 1} if on_last_stage else {0})
        self._end_stages = [layout.pipeline - 1]
        family = model_family(hf)
        if family.stacked_experts:  # vLLM's class of gpt-oss has both ends on every stage
            self._embedding_stages = self._end_stages = list(range(layout.pipeline))
        # vllm/config/parallel.py, use_sequence_parallel_moe: each rank's tokens are its own there.
        splits_tokens = layout.expert_parallel and layout.tensor > 1 and layout.data > 1
        self.replicates_shared_experts = splits_tokens and family.replicates_shared_experts
        self._num_expert_ranks = layout.data * layout.tensor

    def tensors(self, coordinate: Coordinate) -> Iterator[HFTensor]:
        """Yield the tensors of which the rank at `coordinate` needs a part, in checkpoint order."""
        parts = {"layers"}
        if coordinate.pipeline in self._embedding_stages:
            parts.add("embedding")
        if coordinate.pipeline in self._end_stages:
            parts |= {"final_norm", "head"}
        expert_parallel = self.layout.expert_parallel
        rank = coordinate.data * self.layout.tensor + coordinate.tensor
        experts = self._experts_on(rank) if expert_parallel else range(self.table.num_experts)
        return checkpoint_tensors(
            self.table, parts, self._stage_layers[coordinate.pipeline], experts
        )

    def regions_of(self, coordinate: Coordinate) -> Iterator[tuple[HFTensor, Region]]:
        """Yield each tensor that the rank at `coordinate` needs, with the region it needs."""
        for tensor in self.tensors(coordinate):
            region = self.region(tensor, coordinate)
            if region is not None:
                yield tensor, region

    @cached_property
    def regions(self) -> dict[str, dict[Region, list[int]]]:
        """What the ranks of one engine need: HF name -> region -> the ranks that need it."""
        found: dict[str, dict[Region, list[int]]] = {}
        for rank in range(self.layout.ranks_per_engine):
            for tensor, region in self.regions_of(self.layout.coordinate(rank)):
                found.setdefault(tensor.name, {}).setdefault(region, []).append(rank)
        return found

    def region(self, tensor: HFTensor, coordinate: Coordinate) -> Region | None:
        """Return the region of `tensor` that the rank at `coordinate` needs, or None."""
        rule, shape = tensor.rule, tensor.shape
        rank, num_ranks = coordinate.tensor, self.layout.tensor
        if (
            rule.split is replicated
            and tensor.expert is not None
            and not self.layout.expert_parallel
        ):
            # The bias behind an expert's sum over ranks: the first of them adds it.
            return None if coordinate.data or coordinate.tensor else Region.full(shape)
        if rule.split is replicated or tensor.name.endswith(DRAFTER_REPLICATED):
            return Region.full(shape)
        if self.replicates_shared_experts and SHARED_EXPERTS in tensor.name:
            return Region.full(shape)
        if tensor.expert is not None:
            if self.layout.expert_parallel:
                return Region.full(shape)
            # Without expert parallelism vLLM splits experts over data x tensor ranks alike.
            rank, num_ranks = coordinate.data * num_ranks + rank, self._num_expert_ranks
        if rule.split in (row_parallel, column_parallel):
            dim = 1 if rule.split is row_parallel else 0
            if shape[dim] % num_ranks:
                self._refuse(tensor, shape[dim], num_ranks)
            return _equal_part(shape, dim, rank, num_ranks)
        if rule.split is vocab_parallel:
            padded = padded_vocabulary(shape[0])
            if padded % num_ranks:
                self._refuse(tensor, padded, num_ranks)
            start, end = rank * padded // num_ranks, min((rank + 1) * padded // num_ranks, shape[0])
            return Region.narrow(shape, 0, start, end - start) if start < end else None
        assert isinstance(rule.split, QueryGroups)
        groups = rule.split.num_groups
        if tensor.source == 0 or groups % num_ranks == 0:
            return _equal_part(shape, 0, rank, num_ranks)
        # There are fewer key-value heads than ranks, so several ranks have the same one.
        return _equal_part(shape, 0, rank * groups // num_ranks, groups)

    def _refuse(self, tensor: HFTensor, size: int, num_ranks: int) -> NoReturn:
        keys, remedy = f"rollout.tensor={self.layout.tensor}", ""
        padded = "" if size in tensor.shape else " padded rows"
        if tensor.expert is not None:
            keys += f" x rollout.data={self.layout.data}"
            remedy = ", or set rollout.expert_parallel: true"
        raise UserError(
            f"{keys}: {num_ranks} engine ranks cannot share {tensor.name} {tensor.shape}, as size "
            f"{num_ranks} does not divide {size}{padded}; choose a divisor of {size}{remedy}",
            key="rollout.tensor",
            cause=Cause.INDIVISIBLE,
        )

    def _experts_on(self, rank: int) -> list[int]:
        """Return the routed experts on a rank of a stage under expert parallelism (FusedMoE, linear
        placement: the first ranks have one more where they do not divide). Copies stand behind all
        experts, from the first (vLLM's `EplbState.build_initial_global_physical_to_logical_map`):
        there a push puts them, and `engines.plugin.expert_placement` moves them on."""
        experts = self.table.num_experts
        physical = experts + self.layout.redundant_experts
        per_rank, rest = divmod(physical, self._num_expert_ranks)
        start = rank * per_rank + min(rank, rest)
        return [i % experts for i in range(start, start + per_rank + (rank < rest))]


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """Return the decoder layers of each pipeline stage. Where the stages do not divide them, the
    stages before the last have one more (vllm/distributed/utils.py, get_pp_indices)."""
    lengths = [num_layers // num_stages] * num_stages
    for i in range(2, num_layers % num_stages + 2):
        lengths[-i] += 1
    starts = [sum(lengths[:i]) for i in range(num_stages)]
    return [range(s, s + n) for s, n in zip(starts, lengths, strict=True)]


def _equal_part(shape: Shape, dim: int, rank: int, num_ranks: int) -> Region:
    length = shape[dim] // num_ranks
    return Region.narrow(shape, dim, rank * length, length)


class EngineSharding(Protocol):
    """What the ranks of one engine need: HF name -> region -> the ranks that need it."""

    @property
    def regions(self) -> Mapping[str, Mapping[Region, Sequence[int]]]:
        """HF name -> region -> the ranks that need it."""


class Planner:
    """What moves between two layouts of the model that `hf` describes.

    Args:
        hf: the model's `config.json`.
        grid: the trainer ranks.
        engines: the layout of all engines.
        stages: the shards of each pipeline rank's virtual stages
            (`models.weights.layout.stage_shards`), default an even spread.
        sharding: what the ranks of an engine need, default `PredictedSharding`.
        rules: the weight table of what moves, default the model's; or its adapters'.

    Raises:
        UserError: for an impossible layout.
    """

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        engines: EngineLayout,
        stages: Sequence[Sequence[Shard]] | None = None,
        sharding: EngineSharding | None = None,
        rules: WeightTable | None = None,
    ):
        self.grid, self.engines, self.table = grid, engines, rules or weight_table(hf)
        self.sharding = sharding or PredictedSharding(hf, engines)
        stages = stages or stage_shards(hf, grid.pipeline, with_mtp=False)
        decoder, drafter = len(self.table.layers), len(self.table.mtp)
        self._stage_of_layer = {
            layer: rank
            for rank, chunks in enumerate(stages)
            for chunk in chunks
            for layer in (*chunk.layers, *range(decoder, decoder + drafter * chunk.mtp))
        }
        self._stage_of_part = {
            part: next(r for r, chunks in enumerate(stages) for c in chunks if getattr(c, part))
            for part in ("embedding", "final_norm", "head")
        }
        experts = self.table.num_experts
        if experts and experts % grid.expert:
            raise UserError(
                f"parallel.expert={grid.expert} does not divide {experts} experts; choose a "
                f"divisor of {experts}",
                key="parallel.expert",
                cause=Cause.INDIVISIBLE,
            )

    def region_transfers(
        self,
    ) -> Iterator[tuple[HFTensor, range, list[tuple[Region, Sequence[int]]]]]:
        """Yield everything that is sent: a tensor, trainer ranks that all hold the same part of it,
        and the regions of that part that ranks of an engine need, with these ranks."""
        for stage in range(self.grid.pipeline):
            for expert_rank in range(self.grid.expert):
                for item in self._held_tensors(stage, expert_rank):
                    if item.expert is None and expert_rank:
                        continue
                    needed = self.sharding.regions.get(item.name, {}).items()
                    for held, replicas in self._held_regions(item, stage):
                        common = ((held.intersection(region), ranks) for region, ranks in needed)
                        if found := [(region, ranks) for region, ranks in common if region]:
                            yield item, replicas, found

    def _held_regions(self, item: HFTensor, stage: int) -> Iterator[tuple[Region, range]]:
        """Yield the parts of a tensor, each with the trainer ranks that hold it."""
        grid, rule = self.grid, item.rule
        if rule.split in (replicated, replicated_stack) and item.expert is None:
            yield Region.full(item.shape), grid.unsplit_replicas(stage)
            return
        ranks = grid.tensor if item.expert is None else grid.expert_tensor
        name = rule.sources[item.source].name
        for tensor_rank in range(ranks):
            if item.expert is None:
                replicas = grid.dense_replicas(stage, tensor_rank)
            else:
                owner = item.expert * grid.expert // self.table.num_experts
                replicas = grid.expert_replicas(stage, tensor_rank, owner)
            for piece in rule.split(rule.sources, tensor_rank, ranks)[1]:
                if piece.hf_name == name:
                    yield Region.from_piece(piece, item.shape), replicas

    def _held_tensors(self, stage: int, expert_rank: int) -> Iterator[HFTensor]:
        """Yield the tensors of which a trainer rank of `stage` holds a part."""
        per_rank = self.table.num_experts // self.grid.expert
        experts = range(expert_rank * per_rank, (expert_rank + 1) * per_rank)
        layers = [layer for layer, owner in self._stage_of_layer.items() if owner == stage]
        parts = {part for part, owner in self._stage_of_part.items() if owner == stage}
        return checkpoint_tensors(self.table, {"layers", *parts}, sorted(layers), experts)
