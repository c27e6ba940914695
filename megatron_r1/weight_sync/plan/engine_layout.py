"""What each rank of a vLLM engine needs of every Hugging Face tensor.

The same weight table that lays a model out over Megatron's ranks says how vLLM splits it: each way
of splitting there (rules.py) has one here. vLLM 0.32's classes: columns is ColumnParallelLinear and
MergedColumnParallelLinear, rows RowParallelLinear, whole ReplicatedLinear and norms, vocabulary
VocabParallelEmbedding and ParallelLMHead, query_groups QKVParallelLinear; routed experts are
FusedMoE's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.plan.tensors import Tensor, is_tied, tensors
from megatron_r1.weights.layout import table
from megatron_r1.weights.rules import Shape, columns, rows, vocabulary, whole

VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to this (DEFAULT_VOCAB_PADDING_SIZE) before it splits it."""

Place = tuple[int, int, int]
"""(pipeline, data, tensor) within an engine."""


@dataclass(frozen=True)
class EnginePlace:
    """One engine rank: which engine, and where in it."""

    engine: int
    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class EngineLayout:
    """`engines` engines of pipeline x data x tensor ranks each.

    expert_parallel: whether routed experts are spread whole over the data x tensor ranks of a stage
    (--enable-expert-parallel); else each is split over them. vLLM's ranks count tensor fastest,
    then pipeline, then data."""

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

    def place(self, rank: int) -> EnginePlace:
        """Of global engine rank `rank`, engine after engine."""
        engine, within = divmod(rank, self.ranks_per_engine)
        within, tensor = divmod(within, self.tensor)
        data, pipeline = divmod(within, self.pipeline)
        return EnginePlace(engine, pipeline, data, tensor)

    def rank(self, at: EnginePlace) -> int:
        within = (at.data * self.pipeline + at.pipeline) * self.tensor + at.tensor
        return at.engine * self.ranks_per_engine + within


class EngineNeeds:
    """The needs of one engine of `layout` for the model `hf` describes; all engines' are the same.

    Multi-token-prediction layers are a drafter's and not asked for. Raises ValueError where vLLM
    could not split the model so.
    """

    def __init__(self, hf: dict, layout: EngineLayout):
        self.layout, self.table = layout, table(hf)
        heads = hf["num_attention_heads"]
        if heads % layout.tensor:
            raise ValueError(
                f"rollout tensor parallel size {layout.tensor} does not divide "
                f"num_attention_heads={heads}; choose a divisor"
            )
        self.layers = _stage_layers(len(self.table.layers), layout.pipeline)
        self._stage_of = [stage for stage, layers in enumerate(self.layers) for _ in layers]
        self._embedding_stages = sorted({0, layout.pipeline - 1} if is_tied(self.table) else {0})
        self._places = [
            [
                (stage, data, tensor)
                for data in range(layout.data)
                for tensor in range(layout.tensor)
            ]
            for stage in range(layout.pipeline)
        ]

    def tensors(self, at: EnginePlace) -> Iterator[Tensor]:
        """What the rank at `at` needs a part of, in checkpoint order."""
        parts = {"layers"}
        if at.pipeline in self._embedding_stages:
            parts.add("embedding")
        if at.pipeline == self.layout.pipeline - 1:
            parts |= {"final_norm", "head"}
        spread = self.layout.expert_parallel
        experts = self.experts_of(at) if spread else range(self.table.num_experts)
        return tensors(self.table, parts, self.layers[at.pipeline], experts)

    def needed(self, at: EnginePlace) -> Iterator[tuple[Tensor, Region]]:
        """The part of each tensor that the rank at `at` needs."""
        for tensor in self.tensors(at):
            region = self.region(tensor, (at.pipeline, at.data, at.tensor))
            if region is not None:
                yield tensor, region

    def places(self, tensor: Tensor) -> list[Place]:
        """Who needs a part of `tensor`, in a fixed order."""
        if tensor.layer is not None:
            stages = [self._stage_of[tensor.layer]]
        elif tensor.part == "embedding":
            stages = self._embedding_stages
        else:
            stages = [self.layout.pipeline - 1]
        if tensor.expert is not None and self.layout.expert_parallel:
            return [self._places[stages[0]][self._owner(tensor.expert)]]
        return [place for stage in stages for place in self._places[stage]]

    def alike(self, tensor: Tensor) -> object:
        """Tensors with the same answer are wanted alike: those of layers on one engine stage. None
        where there are too few."""
        if tensor.expert is not None and self.layout.expert_parallel:
            return None
        return id(tensor.rule), tensor.source, self.places(tensor)[0][0]

    def experts_of(self, at: EnginePlace) -> range:
        """Routed experts, whole, on the rank at `at` under expert parallelism (FusedMoE, linear
        placement: the first ranks have one more where they do not divide)."""
        each, more = divmod(self.table.num_experts, self._expert_ranks)
        rank = at.data * self.layout.tensor + at.tensor
        start = rank * each + min(rank, more)
        return range(start, start + each + (rank < more))

    def region(self, tensor: Tensor, place: Place) -> Region | None:
        """What the rank at `place` needs of `tensor`; None for nothing."""
        rule, shape = tensor.rule, tensor.shape
        rank, ranks = place[2], self.layout.tensor
        if rule.split is whole:
            return Region.whole(shape)
        if tensor.expert is not None:
            if self.layout.expert_parallel:
                return Region.whole(shape)
            # Without expert parallelism vLLM splits experts over data x tensor ranks alike.
            rank, ranks = place[1] * ranks + rank, self._expert_ranks
        if rule.split is rows:
            return _share(shape, 1, rank, ranks)
        if rule.split is columns:
            return _share(shape, 0, rank, ranks)
        if rule.split is vocabulary:
            padded = -(-shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            start, end = rank * padded // ranks, min((rank + 1) * padded // ranks, shape[0])
            return Region.along(shape, 0, start, end - start) if start < end else None
        groups = rule.split.num_groups  # query_groups, the only other split
        if tensor.source == 0 or groups % ranks == 0:
            return _share(shape, 0, rank, ranks)
        return _share(shape, 0, rank * groups // ranks, groups)  # several ranks share a head

    @property
    def _expert_ranks(self) -> int:
        return self.layout.data * self.layout.tensor

    def _owner(self, expert: int) -> int:
        each, more = divmod(self.table.num_experts, self._expert_ranks)
        full = more * (each + 1)
        return expert // (each + 1) if expert < full else more + (expert - full) // each


def _stage_layers(num_layers: int, stages: int) -> list[range]:
    """Decoder layers of each pipeline stage: what does not divide goes to the stages before the
    last (vllm/distributed/utils.py, get_pp_indices)."""
    lengths = [num_layers // stages] * stages
    for i in range(2, num_layers % stages + 2):
        lengths[-i] += 1
    starts = [sum(lengths[:i]) for i in range(stages)]
    return [range(s, s + n) for s, n in zip(starts, lengths, strict=True)]


def _share(shape: Shape, dim: int, rank: int, ranks: int) -> Region:
    if shape[dim] % ranks:
        raise ValueError(
            f"rollout tensor parallel size {ranks} does not divide dimension {dim} of a tensor of "
            f"shape {shape}; choose a divisor of {shape[dim]}"
        )
    length = shape[dim] // ranks
    return Region.along(shape, dim, rank * length, length)
