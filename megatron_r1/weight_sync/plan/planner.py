"""The parts of each tensor that trainer ranks hold, and those that engine ranks need, from which
`engine_sets` makes the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_r1.errors import Cause, UserError
from megatron_r1.weight_sync.plan.predicted_layout import PredictedLayout
from megatron_r1.weight_sync.plan.ranks import Coordinate, EngineLayout, TrainerGrid
from megatron_r1.weight_sync.plan.tensors import HFTensor, Region, checkpoint_tensors
from megatron_r1.weights.layout import Shard, stage_shards
from megatron_r1.weights.rules import whole

if TYPE_CHECKING:  # imports torch
    from megatron_r1.weight_sync.plan.receiver_layout import ReceiverLayout


class Holding(NamedTuple):
    """The part of a tensor that all ranks of `replicas` hold."""

    region: Region
    replicas: range


class Planner:
    """What moves between two layouts of the model that `hf` describes.

    stages: the shards of each pipeline rank's virtual stages (`weights.layout.stage_shards`),
    default an even spread. needs: default `PredictedLayout`. Raises UserError for an impossible
    layout."""

    def __init__(
        self,
        hf: dict,
        grid: TrainerGrid,
        engines: EngineLayout,
        stages: Sequence[Sequence[Shard]] | None = None,
        needs: PredictedLayout | ReceiverLayout | None = None,
    ):
        self.grid, self.engines = grid, engines
        self.needs = needs or PredictedLayout(hf, engines)
        self.table = self.needs.table
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
        self._needed: dict[tuple, list[tuple[Coordinate, Region]]] = {}
        experts = self.table.num_experts
        if experts and experts % grid.expert:
            raise UserError(
                f"parallel.expert={grid.expert} does not divide {experts} experts; choose a "
                f"divisor of {experts}",
                key="parallel.expert",
                cause=Cause.INDIVISIBLE,
            )

    def shared_holdings(self) -> Iterator[tuple[HFTensor, range, list[tuple[Coordinate, Region]]]]:
        """Yield everything that is sent, by holding: the tensor, the holding's replicas, and the
        parts of the holding that each engine needs, with their coordinates.

        An iterator, so that sums over a million transfers need no list of them."""
        for stage in range(self.grid.pipeline):
            for expert_rank in range(self.grid.expert):
                for item in self.held_tensors(stage, expert_rank):
                    if item.expert is None and expert_rank:
                        continue
                    for region, replicas in self.holdings(item):
                        if needed := self.needed_parts(item, region):
                            yield item, replicas, needed

    def holdings(self, item: HFTensor) -> Iterator[Holding]:
        """Yield the parts of a tensor over the trainer's ranks."""
        grid, rule = self.grid, item.rule
        layer = item.layer
        stage = self._stage_of_part[item.part] if layer is None else self._stage_of_layer[layer]
        if rule.split is whole and item.expert is None:
            yield Holding(Region.whole(item.shape), grid.whole_replicas(stage))
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
                    yield Holding(Region.from_piece(piece, item.shape), replicas)

    def needed_parts(self, item: HFTensor, held: Region) -> list[tuple[Coordinate, Region]]:
        """Return the parts of `held` that the ranks of one engine need, with their coordinates."""
        key = self.needs.cache_key(item)
        if key is not None and (key, held) in self._needed:
            return self._needed[key, held]
        needed = []
        for coordinate in self.needs.coordinates(item):
            region = self.needs.region(item, coordinate)
            part = held.intersection(region) if region else None
            if part:
                needed.append((coordinate, part))
        if key is not None:
            self._needed[key, held] = needed
        return needed

    def held_tensors(self, stage: int, expert_rank: int) -> Iterator[HFTensor]:
        """Yield the tensors of which a trainer rank of `stage` holds a part."""
        per_rank = self.table.num_experts // self.grid.expert
        experts = range(expert_rank * per_rank, (expert_rank + 1) * per_rank)
        layers = [layer for layer, owner in self._stage_of_layer.items() if owner == stage]
        parts = {part for part, owner in self._stage_of_part.items() if owner == stage}
        return checkpoint_tensors(self.table, {"layers", *parts}, sorted(layers), experts)
