"""Which regions of each tensor are sent: the intersections of what trainer ranks hold and what
engine ranks need. `planned_links` makes the plan of these. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights import table
from megatron_r1.models.weights.layout import Shard, stage_shards
from megatron_r1.models.weights.splits import Piece, replicated, replicated_stack
from megatron_r1.models.weights.table import WeightRule, WeightTable
from megatron_r1.push.matching.layouts import EngineLayout, TrainerGrid
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import HFTensor, checkpoint_tensors


class EngineSharding(Protocol):
    """What the ranks of one engine need: HF name -> region -> the ranks that need it."""

    @property
    def regions(self) -> Mapping[str, Mapping[Region, Sequence[int]]]:
        """HF name -> region -> the ranks that need it."""


class MatchedRegions:
    """The regions that move between two layouts of the model that `hf_config` describes.

    Args:
        hf_config: the model's `config.json`.
        grid: the trainer ranks.
        layout: the layout of all engines.
        stages: the shards of each pipeline rank's virtual stages
            (`models.weights.layout.stage_shards`), default an even spread.
        sharding: what the ranks of an engine need, default `PredictedSharding`.
        weight_table: the weight table of what moves, default the model's; or its adapters'.

    Raises:
        UserError: for an impossible layout.
    """

    def __init__(
        self,
        hf_config: HFConfig,
        grid: TrainerGrid,
        layout: EngineLayout,
        stages: Sequence[Sequence[Shard]] | None = None,
        sharding: EngineSharding | None = None,
        weight_table: WeightTable | None = None,
    ):
        self.grid = grid
        self.layout = layout
        self.weight_table = weight_table or table.weight_table(hf_config)
        self.sharding = sharding or PredictedSharding(hf_config, layout)
        self._pieces_of_rules: dict[tuple[int, int], Sequence[Piece]] = {}
        stages = stages or stage_shards(hf_config, grid.pipeline, with_mtp=False)
        decoder, drafter = len(self.weight_table.layers), len(self.weight_table.mtp)
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
        experts = self.weight_table.num_experts
        if experts and experts % grid.expert:
            raise UserError(
                f"parallel.expert={grid.expert} does not divide {experts} experts; choose a "
                f"divisor of {experts}",
                key="parallel.expert",
                cause=Cause.INDIVISIBLE,
            )

    def sent_regions(
        self,
    ) -> Iterator[tuple[HFTensor, range, list[tuple[Region, Sequence[int]]]]]:
        """Yield tensors with the trainer ranks that hold a part of each, and what is sent of it.

        These are the regions of the part that an engine needs, each with the engine's ranks."""
        for stage in range(self.grid.pipeline):
            for expert_rank in range(self.grid.expert):
                for hf_tensor in self._held_tensors(stage, expert_rank):
                    if hf_tensor.expert is None and expert_rank:
                        continue
                    engine_regions = self.sharding.regions.get(hf_tensor.name, {}).items()
                    for held_region, replicas in self._held_regions(hf_tensor, stage):
                        common_regions = (
                            (held_region.intersection(region), ranks)
                            for region, ranks in engine_regions
                        )
                        if needed_regions := [
                            (region, ranks) for region, ranks in common_regions if region
                        ]:
                            yield hf_tensor, replicas, needed_regions

    def _held_regions(self, hf_tensor: HFTensor, stage: int) -> Iterator[tuple[Region, range]]:
        """Yield the parts of a tensor, each with the trainer ranks that hold it."""
        grid, rule = self.grid, hf_tensor.rule
        if rule.split in (replicated, replicated_stack) and hf_tensor.expert is None:
            yield Region.full(hf_tensor.shape), grid.unsplit_replicas(stage)
            return
        ranks = grid.tensor if hf_tensor.expert is None else grid.expert_tensor
        name = rule.sources[hf_tensor.source].name
        for tensor_rank in range(ranks):
            if hf_tensor.expert is None:
                replicas = grid.dense_replicas(stage, tensor_rank)
            else:
                owner = hf_tensor.expert * grid.expert // self.weight_table.num_experts
                replicas = grid.expert_replicas(stage, tensor_rank, owner)
            for piece in self._pieces_on_rank(rule, tensor_rank, ranks):
                if piece.hf_name == name:
                    yield Region.from_piece(piece, hf_tensor.shape), replicas

    def _pieces_on_rank(self, rule: WeightRule, tensor_rank: int, ranks: int) -> Sequence[Piece]:
        """Return what a tensor rank holds of a rule's tensors: of every expert's the same."""
        key = id(rule), tensor_rank
        if key not in self._pieces_of_rules:
            self._pieces_of_rules[key] = rule.split(rule.sources, tensor_rank, ranks)[1]
        return self._pieces_of_rules[key]

    def _held_tensors(self, stage: int, expert_rank: int) -> Iterator[HFTensor]:
        """Yield the tensors of which a trainer rank of `stage` holds a part."""
        per_rank = self.weight_table.num_experts // self.grid.expert
        experts = range(expert_rank * per_rank, (expert_rank + 1) * per_rank)
        layers = [layer for layer, owner in self._stage_of_layer.items() if owner == stage]
        parts = {part for part, owner in self._stage_of_part.items() if owner == stage}
        return checkpoint_tensors(self.weight_table, {"layers", *parts}, sorted(layers), experts)
