"""Parameters of a model, from the weight table: total, active per token, and per pipeline rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from math import prod

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.memory import ParameterCounts, count_parameters
from megatron_r1.models.weights.layout import Shard, layout_from_table, parameter_layout
from megatron_r1.models.weights.table import WeightRule, weight_table
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, QuantityTable


class RankCounts:
    """Counts of the model chunks of a job; each kind of layer is counted once and cached."""

    def __init__(self, job: PlannedJob):
        self.job = job
        parallel = job.parallel
        self._shard = replace(
            Shard((), False, False, False, False),
            tp=(0, parallel.tensor),
            ep=(0, parallel.expert),
            etp=(0, parallel.expert_tensor),
            transformer_engine=True,
        )
        sizes = (parallel.tensor, parallel.expert, parallel.expert_tensor)
        self._counts_by_key: dict[Hashable, ParameterCounts] = job.count_cache.setdefault(
            ("counts", *sizes), {}
        )

    def rank_counts(self, pipeline_rank: int) -> ParameterCounts:
        """Return the counts of one rank of this pipeline rank: the sum over its virtual stages."""
        return sum(
            map(self.chunk_counts, self.job.pipeline_stages[pipeline_rank]), ParameterCounts()
        )

    def chunk_counts(self, chunk: Shard) -> ParameterCounts:
        """Return the counts of one virtual stage on one rank. Layers of one kind, and equal chunks,
        are counted once."""
        ends = {name: getattr(chunk, name) for name in ("embedding", "final_norm", "head", "mtp")}
        kinds = Counter(self.job.is_sparse_layer[layer] for layer in chunk.layers)
        key = (*ends.values(), *sorted(kinds.items()))
        if key not in self._counts_by_key:
            layer_of_kind = {self.job.is_sparse_layer[layer]: layer for layer in chunk.layers}
            shards = {kind: replace(self._shard, layers=(layer_of_kind[kind],)) for kind in kinds}
            layers = (self._shard_counts(kind, shards[kind]) * n for kind, n in kinds.items())
            counts = self._shard_counts((*ends.values(),), replace(self._shard, **ends))
            self._counts_by_key[key] = counts + sum(layers, ParameterCounts())
        return self._counts_by_key[key]

    def _shard_counts(self, key: Hashable, shard: Shard) -> ParameterCounts:
        if key not in self._counts_by_key:
            job, adapters = self.job, self.job.adapters
            trained_entries = None if adapters is None else layout_from_table(adapters, shard)
            self._counts_by_key[key] = count_parameters(
                parameter_layout(job.hf_config, shard), job.config.model.mtp, trained_entries
            )
        return self._counts_by_key[key]


class ModelCounts:
    """Counts of the whole model, for any layout.

    Args:
        hf_config: the model's config.json."""

    def __init__(self, hf_config: HFConfig):
        table = weight_table(hf_config)
        experts, topk = table.num_experts, hf_config.get("num_experts_per_tok", 0)
        # All layers of one kind share one list of the table.
        kinds = Counter(map(id, table.layers))
        layers = {id(layer): layer for layer in table.layers}
        expert_size = sum(
            times * _count_values(layers[kind], True) for kind, times in kinds.items()
        )
        ends = (
            _count_values(table.embedding)
            + _count_values(table.final_norm)
            + _count_values(table.head)
        )
        is_tied = bool(hf_config.get("tie_word_embeddings"))
        if is_tied:
            ends -= _count_values(table.embedding)
        self.num_shared = ends + sum(
            n * _count_values(layers[kind], False) for kind, n in kinds.items()
        )
        """Parameters outside routed experts and MTP layers."""
        self.num_routed = experts * expert_size
        self.num_total = self.num_shared + self.num_routed
        self.num_active = self.num_shared + topk * expert_size
        """Parameters on one token's path: all but the experts it is not routed to."""
        self.num_multiplied = self.num_active - (0 if is_tied else _count_values(table.embedding))
        """Parameters one token is multiplied with: not the embedding, of which it reads a row."""
        self.mtp_own = sum(
            _count_values(layer, False) + experts * _count_values(layer, True)
            for layer in table.mtp
        )
        """Parameters of the MTP layers, without their copies of embedding and head."""
        self.mtp_routed = experts * sum(_count_values(layer, True) for layer in table.mtp)
        copies = _count_values(table.embedding) + _count_values(table.head)
        self.mtp = self.mtp_own + len(table.mtp) * copies
        """Parameters of the MTP layers in the checkpoint, copies included."""


def _count_values(rules: list[WeightRule], of_experts: bool = False) -> int:
    """Return the number of values of one expert's rules, or of all other rules."""
    return sum(
        prod(source.shape)
        for rule in rules
        if rule.is_expert == of_experts
        for source in rule.sources
    )


def parameter_section(job: PlannedJob) -> QuantityTable:
    """Return the parameters: of the whole model, of the fullest rank if the job trains, and of MTP
    layers if the model has some."""
    counts = ModelCounts(job.hf_config)
    experts, topk = job.hf_config.get("n_routed_experts"), job.hf_config.get("num_experts_per_tok")
    section = {
        "total": (counts.num_total, "sum of the weight table's shapes, without MTP layers"),
        "active": (
            counts.num_active,
            f"total - routed experts x (1 - {topk} / {experts})" if experts else "all",
        ),
    }
    if job.trains:
        ranks = RankCounts(job)
        by_rank = [ranks.rank_counts(rank).parameters for rank in range(job.parallel.pipeline)]
        fullest_rank = by_rank.index(max(by_rank))
        least_parameters = Quantity(min(by_rank), "parameters")
        formula = f"pipeline rank {fullest_rank}, the fullest; least: {least_parameters}"
        section["per_rank"] = (by_rank[fullest_rank], formula)
    if counts.mtp:
        formula = "the checkpoint's MTP layers, copies of embedding, head included"
        section["mtp"] = (counts.mtp, formula)
        section["mtp_own"] = (counts.mtp_own, "the same without those copies")
    return {name: Quantity(n, "parameters", formula) for name, (n, formula) in section.items()}
