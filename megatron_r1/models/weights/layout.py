"""The parameters of every rank, from `config.json` and parallel coordinates alone.

No model is built, so a laptop can plan the resharding or the memory of thousands of ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.pipeline_stages import pipeline_stages
from megatron_r1.models.weights.splits import Piece, Shape, replicated, replicated_stack
from megatron_r1.models.weights.table import WeightRule, WeightTable, weight_table

AxisRank = tuple[int, int]
"""(rank, number of ranks) along one parallel axis."""


@dataclass(frozen=True)
class Shard:
    """The part of a model on one rank: some layers, and a part of each.

    Attributes:
        layers: global indices of its decoder layers, in order.
        embedding: whether it has the embedding.
        final_norm: whether it has the norm after the last decoder layer.
        head: whether it has the LM head.
        mtp: whether it has the MTP layers.
        tp: (rank, size) of tensor parallelism.
        ep: (rank, size) of expert parallelism.
        etp: (rank, size) of the tensor parallelism of experts.
        transformer_engine: whether its parameters have Transformer Engine's names.
    """

    layers: tuple[int, ...]
    embedding: bool = True
    final_norm: bool = True
    head: bool = True
    mtp: bool = True
    tp: AxisRank = (0, 1)
    ep: AxisRank = (0, 1)
    etp: AxisRank = (0, 1)
    transformer_engine: bool = False


@dataclass(frozen=True)
class LayoutEntry:
    """One parameter of one rank.

    Attributes:
        shape: the shape of this rank's part of the parameter.
        pieces: the HF tensors in the parameter; rows without a piece are vocabulary padding.
        is_replicated: whether all tensor ranks have the same pieces.
        is_owner: whether this rank writes the pieces. Of the ranks along the tensor and pipeline
            axes that hold the same pieces, one does.
        is_expert: whether the parameter's replicas are in the expert-data-parallel group.
        dtype: the parameter's dtype if it differs from the model's, else None."""

    shape: Shape
    pieces: tuple[Piece, ...]
    is_replicated: bool
    is_owner: bool
    is_expert: bool
    dtype: str | None


def hf_tensors(hf_config: HFConfig, *, with_mtp: bool = True) -> dict[str, tuple[Shape, str]]:
    """Return name -> (shape, dtype) of every tensor of the full HF checkpoint, in its order.

    The dtype is config.json's (default "bfloat16"), except for tensors that have their own.

    Args:
        hf_config: the model's `config.json`.
        with_mtp: whether the MTP layers are counted.
    """
    table = weight_table(hf_config)
    default = hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16"
    tensors: dict[str, tuple[Shape, str]] = {}
    for prefix, rule in _prefixed_rules(table, with_mtp):
        for source in rule.sources:
            for expert in range(table.num_experts if rule.is_expert else 1):
                name = prefix + source.name.replace("{e}", str(expert))
                tensors.setdefault(name, (source.shape, rule.dtype or default))
    if with_mtp:
        tensors |= {name: tensors[original] for name, original in table.duplicate_of.items()}
    return tensors


def num_parameters(hf_config: HFConfig, *, with_mtp: bool = True) -> int:
    """Return the number of elements of all tensors that `hf_tensors` lists."""
    return sum(prod(shape) for shape, _ in hf_tensors(hf_config, with_mtp=with_mtp).values())


def stage_shards(
    hf_config: HFConfig,
    pipeline: int = 1,
    virtual: int = 1,
    *,
    pipeline_layout: str | None = None,
    with_mtp: bool = True,
) -> list[list[Shard]]:
    """Return the shard of every model chunk, result[pipeline rank][virtual stage], whole along the
    other axes. Errors as `pipeline_stages`.

    Args:
        hf_config: the model's `config.json`.
        pipeline: its stages.
        virtual: chunks of a stage.
        pipeline_layout: Megatron's description of the stages; None: an even spread.
        with_mtp: whether the MTP layers are on the last stage.
    """
    num_mtp = len(weight_table(hf_config).mtp) if with_mtp else 0
    stages = pipeline_stages(
        hf_config["num_hidden_layers"], pipeline, virtual, num_mtp=num_mtp, layout=pipeline_layout
    )
    return [[Shard(**vars(chunk)) for chunk in chunks] for chunks in stages]


def recipe_stages(config: Config, hf_config: HFConfig) -> list[list[Shard]]:
    """Return `stage_shards` of the model that a recipe trains: what runs, pushes and plans use."""
    parallel = config.parallel
    return stage_shards(
        hf_config,
        parallel.pipeline,
        parallel.virtual_pipeline,
        pipeline_layout=parallel.pipeline_layout,
        with_mtp=config.model.mtp != "none",
    )


def parameter_layout(hf_config: HFConfig, shard: Shard) -> dict[str, LayoutEntry]:
    """Return Megatron parameter name -> LayoutEntry, for all parameters of the shard."""
    return layout_from_table(weight_table(hf_config), shard)


def layout_from_table(weight_table: WeightTable, shard: Shard) -> dict[str, LayoutEntry]:
    """Return `parameter_layout` of the parameters that `weight_table` lists."""
    entries: dict[str, LayoutEntry] = {}

    def add(rule: WeightRule, megatron: str, prefix: str, owner: bool = True) -> None:
        for name, entry in _rule_entries(rule, prefix, shard, weight_table.num_experts):
            entries[megatron + name] = replace(entry, is_owner=entry.is_owner and owner)

    if shard.embedding or shard.mtp:
        for rule in weight_table.embedding:
            add(rule, "", "", owner=shard.embedding)
    for local_layer, layer in enumerate(shard.layers):
        for rule in weight_table.layers[layer]:
            add(rule, f"decoder.layers.{local_layer}.", f"model.layers.{layer}.")
    if shard.final_norm:
        for rule in weight_table.final_norm:
            add(rule, "", "")
    if shard.head:
        embedded_names = {source.name for rule in weight_table.embedding for source in rule.sources}
        for rule in weight_table.head:
            is_tied = rule.sources[0].name in embedded_names
            # Megatron has one parameter for both where both are on one stage, else a second copy.
            if not (is_tied and (shard.embedding or shard.mtp)):
                add(rule, "", "", owner=not is_tied)
    if shard.mtp:
        for index, layer_rules in enumerate(weight_table.mtp):
            for rule in layer_rules:
                add(
                    rule,
                    f"mtp.layers.{index}.",
                    f"model.layers.{len(weight_table.layers) + index}.",
                )
    return entries


def _prefixed_rules(weight_table: WeightTable, with_mtp: bool) -> Iterator[tuple[str, WeightRule]]:
    layers: Iterable[list[WeightRule]] = weight_table.layers + (
        weight_table.mtp if with_mtp else []
    )
    yield from (("", rule) for rule in weight_table.embedding)
    for index, layer in enumerate(layers):
        yield from ((f"model.layers.{index}.", rule) for rule in layer)
    yield from (("", rule) for rule in weight_table.final_norm + weight_table.head)


def _rule_entries(
    rule: WeightRule, prefix: str, shard: Shard, num_experts: int
) -> Iterator[tuple[str, LayoutEntry]]:
    """Yield (Megatron parameter, entry) of a rule, once per expert that the rank has.

    Args:
        rule: the rule of one Megatron parameter.
        prefix: what precedes the names of its HF tensors.
        shard: the rank's place.
        num_experts: the model's routed experts."""
    name = (shard.transformer_engine and rule.te_name) or rule.megatron_name
    rank, num_ranks = shard.etp if rule.is_expert else shard.tp
    shape, pieces = rule.split(rule.sources, rank, num_ranks)
    is_replicated = rule.split in (replicated, replicated_stack)
    group, num_groups = shard.ep
    if rule.is_expert and num_experts % num_groups:
        raise UserError(
            f"parallel.expert={num_groups} does not divide n_routed_experts={num_experts}; choose "
            f"a divisor of {num_experts}",
            key="parallel.expert",
            cause=Cause.INDIVISIBLE,
        )
    num_local = num_experts // num_groups if rule.is_expert else 1
    for local_expert in range(num_local):
        expert = str(group * num_local + local_expert)
        local_pieces = tuple(
            replace(piece, hf_name=prefix + piece.hf_name.replace("{e}", expert))
            for piece in pieces
        )
        entry = LayoutEntry(
            shape=shape,
            pieces=local_pieces,
            is_replicated=is_replicated,
            is_owner=not is_replicated or rank == 0,
            is_expert=rule.is_expert,
            dtype=rule.dtype,
        )
        yield name.replace("{e}", str(local_expert)), entry
