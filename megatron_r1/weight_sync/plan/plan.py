"""The plan of a push: who sends what to whom.

Every element an engine rank needs is sent to it once, by one of the trainer ranks that hold it.
Which one follows from counting alone, so that sender and receiver agree without asking: the ranks
that hold the same part of a tensor take turns over the engine ranks that want it. A rank computes
its own transfers and never sees the others'.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_r1.weight_sync.plan.engine_layout import EngineLayout, EngineNeeds, EnginePlace, Place
from megatron_r1.weight_sync.plan.region import Region
from megatron_r1.weight_sync.plan.tensors import Tensor, tensors
from megatron_r1.weight_sync.plan.trainer_grid import TrainerGrid
from megatron_r1.weights.layout import Shard, stage_shards
from megatron_r1.weights.rules import Shape, whole

if TYPE_CHECKING:  # it needs torch, and a plan does not
    from megatron_r1.weight_sync.plan.receiver_layout import ReceiverLayout


@dataclass(frozen=True)
class Transfer:
    """A region of HF tensor `name`, which has `shape`, on its way.

    sender: global trainer rank; receiver: global engine rank. dtype: the tensor's own, or None for
    the push's."""

    name: str
    shape: Shape
    region: Region
    sender: int
    receiver: int
    dtype: str | None


@dataclass(frozen=True)
class _Holder:
    """The part of a tensor that all ranks of `replicas` hold."""

    region: Region
    replicas: range


@dataclass(frozen=True)
class Part:
    """One holder's part of a tensor and what each engine wants of it: (engine rank counted from
    the engine's first, region), the same for every engine. replicas take turns, the one at
    `offset` first."""

    name: str
    dtype: str | None
    replicas: range
    offset: int
    wanted: list[tuple[int, Region]]


class Planner:
    """Transfers between two layouts of the model `hf` describes; raises ValueError where either
    cannot be.

    stages: what each pipeline rank's virtual stages hold (`weights.layout.stage_shards`), default
    an even spread. needs: what an engine said it needs (`ReceiverLayout`), default what vLLM is
    known to.
    """

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        engines: EngineLayout,
        stages: list[list[Shard]] | None = None,
        needs: EngineNeeds | ReceiverLayout | None = None,
    ):
        self.grid, self.engines = grid, engines
        self.needs = needs or EngineNeeds(hf, engines)
        self.table = self.needs.table
        stages = stages or stage_shards(hf, grid.pipeline, with_mtp=False)
        self._stage_of = {
            layer: rank
            for rank, chunks in enumerate(stages)
            for chunk in chunks
            for layer in chunk.layers
        }
        self._stage_with = {
            part: next(r for r, chunks in enumerate(stages) for c in chunks if getattr(c, part))
            for part in ("embedding", "final_norm", "head")
        }
        self._found: dict[tuple, list[tuple[Place, Region]]] = {}
        experts = self.table.num_experts
        if experts and experts % grid.expert:
            raise ValueError(f"parallel.expert={grid.expert} does not divide {experts} experts")

    def sends(self, rank: int, engine: int | None = None) -> Iterator[Transfer]:
        """What trainer rank `rank` sends, layer by layer; `engine`: to this one only."""
        stage, tensor = self.grid.stage(rank), self.grid.tensor_rank(rank)
        expert_tensor, expert_rank = self.grid.expert_place(rank)
        for item in self._held(stage, expert_rank):
            own = expert_tensor if item.expert is not None else tensor
            for holder in self._holders(item, own):
                wanting = self._wanting(item, holder.region)
                if not wanting:
                    continue
                first, count = 0, len(wanting) * self.engines.engines
                if engine is not None:
                    first, count = engine * len(wanting), (engine + 1) * len(wanting)
                turns = len(holder.replicas)
                mine = holder.replicas.index(rank) - _offset(item.name)
                for turn in range(first + (mine - first) % turns, count, turns):
                    of, index = divmod(turn, len(wanting))
                    yield self._transfer(item, rank, of, *wanting[index])

    def receives(self, rank: int) -> Iterator[Transfer]:
        """What engine rank `rank` gets, layer by layer."""
        at = self.engines.place(rank)
        for item in self.needs.tensors(at):
            for holder in self._holders(item):
                wanting = self._wanting(item, holder.region)
                for index, (place, region) in enumerate(wanting):
                    if place == (at.pipeline, at.data, at.tensor):
                        turn = at.engine * len(wanting) + index + _offset(item.name)
                        sender = holder.replicas[turn % len(holder.replicas)]
                        yield self._transfer(item, sender, at.engine, place, region)

    def parts(self) -> Iterator[Part]:
        """Everything that moves, once; for adding up without a million transfers."""
        for stage in range(self.grid.pipeline):
            for expert_rank in range(self.grid.expert):
                for item in self._held(stage, expert_rank):
                    if item.expert is None and expert_rank:
                        continue
                    for holder in self._holders(item):
                        wanted = [
                            (self.engines.rank(EnginePlace(0, *place)), region)
                            for place, region in self._wanting(item, holder.region)
                        ]
                        offset = _offset(item.name) % len(holder.replicas)
                        yield Part(item.name, item.rule.dtype, holder.replicas, offset, wanted)

    def _transfer(self, item, sender, engine, place, region) -> Transfer:
        receiver = self.engines.rank(EnginePlace(engine, *place))
        return Transfer(item.name, item.shape, region, sender, receiver, item.rule.dtype)

    def _held(self, stage: int, expert_rank: int) -> Iterator[Tensor]:
        """What a trainer rank of `stage` holds."""
        per_rank = self.table.num_experts // self.grid.expert
        experts = range(expert_rank * per_rank, (expert_rank + 1) * per_rank)
        layers = [layer for layer, at in self._stage_of.items() if at == stage]
        ends = {part for part, at in self._stage_with.items() if at == stage}
        return tensors(self.table, {"layers", *ends}, sorted(layers), experts)

    def _stage(self, item: Tensor) -> int:
        """The pipeline rank that holds it."""
        return self._stage_with[item.part] if item.layer is None else self._stage_of[item.layer]

    def _holders(self, item: Tensor, only: int | None = None) -> Iterator[_Holder]:
        """The parts of a tensor over the trainer's ranks; `only`: that of one (expert-)tensor
        rank."""
        grid, rule, stage = self.grid, item.rule, self._stage(item)
        if rule.split is whole:
            yield _Holder(Region.whole(item.shape), grid.whole_replicas(stage))
            return
        ranks = grid.tensor if item.expert is None else grid.expert_tensor
        name = rule.sources[item.source].name
        for part in range(ranks) if only is None else (only,):
            if item.expert is None:
                replicas = grid.dense_replicas(stage, part)
            else:
                owner = item.expert * grid.expert // self.table.num_experts
                replicas = grid.expert_replicas(stage, part, owner)
            for piece in rule.split(rule.sources, part, ranks)[1]:
                if piece.hf_name == name:
                    yield _Holder(Region.of(piece, item.shape), replicas)

    def _wanting(self, item: Tensor, held: Region) -> list[tuple[Place, Region]]:
        """Within one engine: the places that want a part of `held`."""
        alike = self.needs.alike(item)
        if alike is None:
            return self._wanted_of(item, held)
        key = (alike, held)
        if key not in self._found:
            self._found[key] = self._wanted_of(item, held)
        return self._found[key]

    def _wanted_of(self, item: Tensor, held: Region) -> list[tuple[Place, Region]]:
        found = []
        for place in self.needs.places(item):
            region = self.needs.region(item, place)
            part = region and held.meet(region)
            if part:
                found.append((place, part))
        return found


def _offset(name: str) -> int:
    """Where a tensor's turns begin, so that the first replica is not everybody's first choice."""
    return zlib.crc32(name.encode())
