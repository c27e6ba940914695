"""The regions of each tensor that engine ranks need, predicted before any engine runs. No torch.

The weight table that lays a model out over Megatron's ranks also determines how vLLM splits it:
each split of `models.weights.table` has a counterpart here. vLLM 0.32's classes:

    column_parallel   ColumnParallelLinear, MergedColumnParallelLinear
    row_parallel      RowParallelLinear
    whole             ReplicatedLinear, norms
    vocab_parallel    VocabParallelEmbedding, ParallelLMHead
    QueryGroups       QKVParallelLinear

Routed experts are FusedMoE's."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NoReturn

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig, model_family, padded_vocabulary
from megatron_r1.models.weights.splits import (
    QueryGroups,
    Shape,
    column_parallel,
    replicated,
    row_parallel,
    vocab_parallel,
)
from megatron_r1.models.weights.table import weight_table
from megatron_r1.push.matching.layouts import Coordinate, EngineLayout
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import HFTensor, checkpoint_tensors, expert_tensors, is_tied

DRAFTER_REPLICATED = ".eh_proj.weight"
"""The end of a tensor's name: vLLM's drafter has this plain linear layer on every rank, where
Megatron splits it."""

SHARED_EXPERTS = ".shared_experts."


class PredictedSharding:
    """The regions that the ranks of one engine need of the model that `hf_config` describes.

    A plan is made of this where no engine runs; a push is planned with `PublishedSharding`.
    `replicates_shared_experts` says whether every tensor rank has the shared experts whole.

    Args:
        hf_config: the model's `config.json`.
        layout: the layout of all engines.
        drafts: whether the engine drafts with the MTP layers, on its last stage, and so needs them.

    Raises:
        UserError: where vLLM cannot split the model so.
    """

    def __init__(self, hf_config: HFConfig, layout: EngineLayout, *, drafts: bool = False):
        self.layout, self.weight_table = layout, weight_table(hf_config)
        heads = hf_config["num_attention_heads"]
        if heads % layout.tensor_parallel:
            raise UserError(
                f"rollout.tensor_parallel={layout.tensor_parallel} does not divide "
                f"num_attention_heads={heads}; "
                f"choose a divisor of {heads}",
                key="rollout.tensor_parallel",
                cause=Cause.INDIVISIBLE,
            )
        self._stage_layers = stage_layers(len(self.weight_table.layers), layout.pipeline_parallel)
        if drafts:
            num_layers = len(self.weight_table.layers + self.weight_table.mtp)
            self._stage_layers[-1] = range(self._stage_layers[-1].start, num_layers)
        on_last_stage = is_tied(self.weight_table) or drafts
        self._embedding_stages = sorted({0, layout.pipeline_parallel - 1} if on_last_stage else {0})
        self._end_stages = [layout.pipeline_parallel - 1]
        family = model_family(hf_config)
        if family.stacked_experts:  # vLLM's class of gpt-oss has both ends on every stage
            self._embedding_stages = self._end_stages = list(range(layout.pipeline_parallel))
        # vllm/config/parallel.py, use_sequence_parallel_moe: each rank's tokens are its own there.
        splits_tokens = (
            layout.expert_parallel and layout.tensor_parallel > 1 and layout.data_parallel > 1
        )
        self.replicates_shared_experts = splits_tokens and family.replicates_shared_experts
        self._num_expert_ranks = layout.data_parallel * layout.tensor_parallel

    def tensors(self, coordinate: Coordinate) -> Iterator[HFTensor]:
        """Yield the tensors that the rank at `coordinate` needs a part of, in checkpoint order."""
        stage = coordinate.pipeline
        parts, layers = self._parts_on(stage), self._stage_layers[stage]
        return checkpoint_tensors(self.weight_table, parts, layers, self._experts_at(coordinate))

    def regions_of(self, coordinate: Coordinate) -> Iterator[tuple[HFTensor, Region]]:
        """Yield each tensor that the rank at `coordinate` needs, with the region it needs."""
        for tensor in self.tensors(coordinate):
            region = self.region(tensor, coordinate)
            if region is not None:
                yield tensor, region

    def check_divisible(self) -> None:
        """Check that the ranks of an engine can share every tensor.

        Raises:
            UserError: they cannot; it names the tensor and the divisors of its size."""
        # Of one rank of each stage and copy: another's sizes are the same.
        for rank in range(0, self.layout.ranks_per_engine, self.layout.tensor_parallel):
            coordinate = self.layout.coordinate(rank)
            for tensor in self.tensors(coordinate):
                self.region(tensor, coordinate)  # raises

    @cached_property
    def regions(self) -> dict[str, dict[Region, list[int]]]:
        """What the ranks of one engine need: HF name -> region -> the ranks that need it."""
        ranks_of_regions: dict[str, dict[Region, list[int]]] = {}
        for tensor, region, ranks in self.regions_and_ranks():
            by_region = ranks_of_regions.setdefault(tensor.name, {})
            by_region[region] = sorted([*by_region.get(region, ()), *ranks])
        return ranks_of_regions

    def regions_and_ranks(self) -> Iterator[tuple[HFTensor, Region, Sequence[int]]]:
        """Yield regions with ranks of one engine that need them. What is no routed expert's depends
        on the stage and the tensor rank alone, so that it is yielded once for all data ranks."""
        layout = self.layout
        for stage in range(layout.pipeline_parallel):
            dense_tensors = [*self._dense_tensors(stage)]
            for tensor_rank in range(layout.tensor_parallel):
                first = stage * layout.tensor_parallel + tensor_rank
                stride = layout.pipeline_parallel * layout.tensor_parallel
                ranks = range(first, layout.ranks_per_engine, stride)
                for tensor in dense_tensors:
                    region = self.region(tensor, Coordinate(stage, 0, tensor_rank))
                    if region is not None:
                        yield tensor, region, ranks
        for rank in range(layout.ranks_per_engine):
            coordinate = layout.coordinate(rank)
            layers = self._stage_layers[coordinate.pipeline]
            for tensor in expert_tensors(self.weight_table, layers, self._experts_at(coordinate)):
                region = self.region(tensor, coordinate)
                if region is not None:
                    yield tensor, region, (rank,)

    def region(self, tensor: HFTensor, coordinate: Coordinate) -> Region | None:
        """Return the region of `tensor` that the rank at `coordinate` needs, or None."""
        rule, shape = tensor.rule, tensor.shape
        rank, num_ranks = coordinate.tensor, self.layout.tensor_parallel
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
                self._refuse_indivisible(tensor, shape[dim], num_ranks)
            return _equal_part(shape, dim, rank, num_ranks)
        if rule.split is vocab_parallel:
            rows = padded_vocabulary(shape[0])
            if rows % num_ranks:
                self._refuse_indivisible(tensor, rows, num_ranks)
            start, end = rank * rows // num_ranks, min((rank + 1) * rows // num_ranks, shape[0])
            return Region.narrow(shape, 0, start, end - start) if start < end else None
        assert isinstance(rule.split, QueryGroups)
        groups = rule.split.num_groups
        if tensor.source == 0 or groups % num_ranks == 0:
            return _equal_part(shape, 0, rank, num_ranks)
        # There are fewer key-value heads than ranks, so several ranks have the same one.
        return _equal_part(shape, 0, rank * groups // num_ranks, groups)

    def _refuse_indivisible(self, tensor: HFTensor, size: int, num_ranks: int) -> NoReturn:
        keys, remedy = f"rollout.tensor_parallel={self.layout.tensor_parallel}", ""
        padding_note = "" if size in tensor.shape else " padded rows"
        if tensor.expert is not None:
            keys += f" x rollout.data_parallel={self.layout.data_parallel}"
            remedy = ", or set rollout.expert_parallel: true"
        raise UserError(
            f"{keys}: {num_ranks} engine ranks cannot share {tensor.name} {tensor.shape}, as size "
            f"{num_ranks} does not divide {size}{padding_note}; choose a divisor of {size}{remedy}",
            key="rollout.tensor_parallel",
            cause=Cause.INDIVISIBLE,
        )

    def _dense_tensors(self, stage: int) -> Iterator[HFTensor]:
        """Yield the tensors that a stage needs, except routed experts', in checkpoint order."""
        return checkpoint_tensors(
            self.weight_table, self._parts_on(stage), self._stage_layers[stage], experts=()
        )

    def _parts_on(self, stage: int) -> set[str]:
        """Return the parts of the model (`checkpoint_tensors`) that a stage has."""
        parts = {"layers"}
        if stage in self._embedding_stages:
            parts.add("embedding")
        if stage in self._end_stages:
            parts |= {"final_norm", "head"}
        return parts

    def _experts_at(self, coordinate: Coordinate) -> Sequence[int]:
        """Return the indices of the routed experts that the rank holds, whole or split."""
        if not self.layout.expert_parallel:
            return range(self.weight_table.num_experts)
        return self._experts_on(coordinate.data * self.layout.tensor_parallel + coordinate.tensor)

    def _experts_on(self, rank: int) -> list[int]:
        """Return the routed experts on a rank of a stage under expert parallelism.

        FusedMoE places them linearly: where they do not divide, the first ranks have one more.
        Copies stand behind all experts, from the first (vLLM's
        `EplbState.build_initial_global_physical_to_logical_map`): there a push puts them, and
        `engines.plugin.expert_placement` moves them on."""
        experts = self.weight_table.num_experts
        num_physical = experts + self.layout.redundant_experts
        per_rank, remainder = divmod(num_physical, self._num_expert_ranks)
        start = rank * per_rank + min(rank, remainder)
        return [i % experts for i in range(start, start + per_rank + (rank < remainder))]


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
