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

from megatron_r1.weights.layout import Shard, stage_shards
from megatron_r1.weights.push.engine_layout import EngineLayout, EngineNeeds, EnginePlace
from megatron_r1.weights.push.region import Region
from megatron_r1.weights.push.trainer_grid import TrainerGrid
from megatron_r1.weights.rules import Rule, Shape, whole


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
class _Tensor:
    """One HF tensor as the trainer holds it. expert: its global index, or None."""

    rule: Rule
    source: int
    name: str
    stage: int
    layer: int | None
    expert: int | None

    @property
    def shape(self) -> Shape:
        return self.rule.sources[self.source].shape


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
    an even spread.
    """

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        engines: EngineLayout,
        stages: list[list[Shard]] | None = None,
    ):
        self.grid, self.engines = grid, engines
        self.needs = EngineNeeds(hf, engines)
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
        experts = self.table.num_experts
        if experts and experts % grid.expert:
            raise ValueError(f"parallel.expert={grid.expert} does not divide {experts} experts")

    def sends(self, rank: int) -> Iterator[Transfer]:
        """What trainer rank `rank` sends, layer by layer."""
        stage, tensor = self.grid.stage(rank), self.grid.tensor_rank(rank)
        expert_tensor, expert_rank = self.grid.expert_place(rank)
        for item in self._tensors(stage, expert_rank):
            own = expert_tensor if item.expert is not None else tensor
            for holder in self._holders(item, own):
                wanting = self._wanting(item, holder.region)
                count, turns = len(wanting) * self.engines.engines, len(holder.replicas)
                mine = holder.replicas.index(rank)
                for turn in range((mine - _offset(item.name)) % turns, count, turns):
                    engine, index = divmod(turn, len(wanting))
                    yield self._transfer(item, rank, engine, *wanting[index])

    def receives(self, rank: int) -> Iterator[Transfer]:
        """What engine rank `rank` gets, layer by layer."""
        at = self.engines.place(rank)
        for item in self._wanted(at):
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
                for item in self._tensors(stage, expert_rank):
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

    def _tensors(self, stage: int, expert_rank: int) -> Iterator[_Tensor]:
        """What a trainer rank of `stage` holds."""
        per_rank = self.table.num_experts // self.grid.expert
        local = range(expert_rank * per_rank, (expert_rank + 1) * per_rank)
        if self._stage_with["embedding"] == stage:
            yield from _of_rules(self.table.embedding, "", stage, None, local)
        for layer, rules in enumerate(self.table.layers):
            if self._stage_of[layer] == stage:
                yield from _of_rules(rules, f"model.layers.{layer}.", stage, layer, local)
        yield from self._ends(stage)

    def _wanted(self, at: EnginePlace) -> Iterator[_Tensor]:
        """What the engine rank at `at` needs a part of."""
        spread = self.engines.expert_parallel
        local = self.needs.experts_of(at) if spread else range(self.table.num_experts)
        if at.pipeline in self.needs.embedding_stages:
            stage = self._stage_with["embedding"]
            yield from _of_rules(self.table.embedding, "", stage, None, local)
        for layer in self.needs.layers[at.pipeline]:
            stage = self._stage_of[layer]
            rules = self.table.layers[layer]
            yield from _of_rules(rules, f"model.layers.{layer}.", stage, layer, local)
        if at.pipeline == self.engines.pipeline - 1:
            yield from self._ends(None)

    def _ends(self, stage: int | None) -> Iterator[_Tensor]:
        """The final norm and the head, where they lie on `stage` (None: wherever)."""
        embedded = {source.name for rule in self.table.embedding for source in rule.sources}
        for part, rules in (("final_norm", self.table.final_norm), ("head", self.table.head)):
            at = self._stage_with[part]
            own = [rule for rule in rules if rule.sources[0].name not in embedded]
            if stage in (None, at):
                yield from _of_rules(own, "", at, None, range(0))

    def _holders(self, item: _Tensor, only: int | None = None) -> Iterator[_Holder]:
        """The parts of a tensor over the trainer's ranks; `only`: that of one (expert-)tensor
        rank."""
        grid, rule = self.grid, item.rule
        if rule.split is whole:
            yield _Holder(Region.whole(item.shape), grid.whole_replicas(item.stage))
            return
        ranks = grid.tensor if item.expert is None else grid.expert_tensor
        name = rule.sources[item.source].name
        for part in range(ranks) if only is None else (only,):
            if item.expert is None:
                replicas = grid.dense_replicas(item.stage, part)
            else:
                owner = item.expert * grid.expert // self.table.num_experts
                replicas = grid.expert_replicas(item.stage, part, owner)
            for piece in rule.split(rule.sources, part, ranks)[1]:
                if piece.hf_name == name:
                    yield _Holder(Region.of(piece, item.shape), replicas)

    def _wanting(self, item: _Tensor, held: Region) -> list[tuple[tuple[int, int, int], Region]]:
        """Within one engine: the (pipeline, data, tensor) places that want a part of `held`."""
        found = []
        for place in self.needs.places(item.layer, item.expert, item.rule):
            region = self.needs.region(item.rule, item.source, item.expert, place)
            part = region and held.meet(region)
            if part:
                found.append((place, part))
        return found


def _of_rules(rules, prefix: str, stage: int, layer: int | None, experts) -> Iterator[_Tensor]:
    for rule in rules:
        for expert in experts if rule.expert else (None,):
            for index, source in enumerate(rule.sources):
                name = prefix + source.name.replace("{e}", str(expert))
                yield _Tensor(rule, index, name, stage, layer, expert)


def _offset(name: str) -> int:
    """Where a tensor's turns begin, so that the first replica is not everybody's first choice."""
    return zlib.crc32(name.encode())
