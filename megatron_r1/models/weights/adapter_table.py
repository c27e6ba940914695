"""The weight table of adapters: two factors per linear layer, split over ranks as its weight is."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config import Config
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.hf_config import HFConfig, model_family
from megatron_r1.models.weights.layout import Shape, recipe_stages
from megatron_r1.models.weights.splits import (
    Piece,
    Source,
    Split,
    replicated,
    replicated_stack,
    row_parallel,
)
from megatron_r1.models.weights.table import WeightRule, WeightTable, weight_table

A, B = ".lora_A.weight", ".lora_B.weight"
"""Endings of the factors' names, PEFT's, in place of a weight's `.weight`."""


def adapter_table(hf_config: HFConfig, lora: LoraConfig) -> WeightTable:
    """Return the rules of all adapters; names of tensors as in PEFT, without its prefix.

    Raises:
        UserError: the model does not have a target, or PEFT could not load a target's adapters:
            those of experts that files have as one tensor.
    """
    base = weight_table(hf_config)
    if model_family(hf_config).stacked_experts:
        dense_layers = [[rule for rule in layer if not rule.is_expert] for layer in base.layers]
        base = replace(base, layers=dense_layers)
    modules = {
        _module_name(source)
        for layer in base.layers
        for rule in layer
        for source in (rule.sources if _is_linear(rule) else ())
    }
    for target in lora.targets or ():
        if not any(_ends_with(module, target) for module in modules):
            endings = sorted({module.rpartition(".")[2] for module in modules} | modules)
            raise UserError(
                f"model.lora.targets: {target} is no linear layer of this model"
                f"{did_you_mean(target, endings, '{}')}; it has {', '.join(sorted(modules))}",
                key="model.lora.targets",
                cause=Cause.UNKNOWN,
            )
    layers = [[a for rule in layer for a in _adapter_rules(rule, lora)] for layer in base.layers]
    return WeightTable([], layers, [], [], num_experts=base.num_experts)


def check_adapters(config: Config, hf_config: HFConfig) -> None:
    """Raise UserError for a target that the model does not have, and for a pipeline rank without
    any, which could neither train nor save."""
    assert config.model.lora is not None, "the recipe has no adapters"
    table = adapter_table(hf_config, config.model.lora)
    for rank, chunks in enumerate(recipe_stages(config, hf_config)):
        if not any(table.layers[layer] for chunk in chunks for layer in chunk.layers):
            raise UserError(
                f"model.lora: pipeline rank {rank} has no layer with an adapter; choose other "
                "model.lora.targets, or other stages (parallel.pipeline_layout)",
                key="model.lora.targets",
                cause=Cause.EMPTY,
            )


def adapter_shapes(weight_table: WeightTable) -> dict[str, Shape]:
    """Return name -> full shape of all factors that `adapter_table` lists."""
    shapes = {}
    for index, layer in enumerate(weight_table.layers):
        for rule in layer:
            factor_names = rule.split.names if isinstance(rule.split, _Chosen) else None
            for source in rule.sources:
                if factor_names is None or source.name in factor_names:
                    for expert in range(weight_table.num_experts if rule.is_expert else 1):
                        name = source.name.replace("{e}", str(expert))
                        shapes[f"model.layers.{index}.{name}"] = source.shape
    return shapes


def num_adapter_parameters(hf_config: HFConfig, lora: LoraConfig) -> int:
    """Return the number of values of all factors together."""
    return sum(map(prod, adapter_shapes(adapter_table(hf_config, lora)).values()))


def target_modules(weight_table: WeightTable) -> str:
    """Return PEFT's `target_modules`: an expression that matches the names of all layers with an
    adapter."""
    names = {
        source.name.removesuffix(A)
        for layer in weight_table.layers
        for rule in layer
        for source in rule.sources
        if source.name.endswith(A)
    }
    choice = "|".join(re.escape(name).replace(r"\{e\}\.", r"(\d+\.)?") for name in sorted(names))
    return rf"model\.layers\.\d+\.({choice})"


PEFT_PREFIX = "base_model.model."
"""The beginning of every name in PEFT's files."""


def adapter_config(weight_table: WeightTable, lora: LoraConfig, base: str) -> dict[str, Any]:
    """Return PEFT's `adapter_config.json` of these adapters.

    Args:
        weight_table: their weight table.
        lora: rank and scale.
        base: the folder of the model that they belong to."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": target_modules(weight_table),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


@dataclass(frozen=True)
class _Chosen:
    """The split of a fused weight's factors B where some of its layers have no adapter: the rows of
    those layers have no piece.

    Attributes:
        split: that of all layers of the weight.
        names: the factors B that exist."""

    split: Split
    names: frozenset[str]

    def __call__(
        self, sources: tuple[Source, ...], rank: int, num_ranks: int
    ) -> tuple[Shape, list[Piece]]:
        shape, pieces = self.split(sources, rank, num_ranks)
        factor_pieces = [piece for piece in pieces if piece.hf_name in self.names]
        if not factor_pieces:  # with more ranks than key and value heads
            layers = ", ".join(source.name.removesuffix(B) for source in sources)
            raise UserError(
                f"model.lora.targets: tensor rank {rank} of parallel.tensor={num_ranks} has no row "
                f"of the chosen layers among {layers}; choose all of them, or fewer tensor ranks",
                key="model.lora.targets",
                cause=Cause.EMPTY,
            )
        return shape, factor_pieces


def _adapter_rules(rule: WeightRule, lora: LoraConfig) -> Iterator[WeightRule]:
    """Yield the rules of A and B of one Megatron weight, none if it is no target.

    A has a block of `rank` rows per layer. The factor on the side that is split over ranks is split
    like the weight; the other is whole on each."""
    if not _is_linear(rule):
        return
    targets = [
        source
        for source in rule.sources
        if lora.targets is None or any(_ends_with(_module_name(source), t) for t in lora.targets)
    ]
    if not targets:
        return
    by_rows = rule.split is row_parallel
    # Transformer Engine has the experts of a layer in one module, with weight0, weight1, …
    te_name = rule.te_name.replace(".weight{e}", ".lora.{e}") if rule.te_name else None
    megatron = rule.megatron_name.replace(".weight", ".lora")
    factors_a = tuple(_factor_source(source, A, (lora.rank, source.shape[1])) for source in targets)
    factors_b = tuple(
        _factor_source(source, B, (source.shape[0], lora.rank)) for source in rule.sources
    )
    split_b: Split = replicated if by_rows else rule.split
    if len(targets) < len(rule.sources):
        split_b = _Chosen(split_b, frozenset(_factor_source(s, B, ()).name for s in targets))
    by_name = {
        "a": (factors_a, row_parallel if by_rows else replicated_stack),
        "b": (factors_b, split_b),
    }
    for name, (sources, split) in by_name.items():
        te_factor = f"{te_name}.{name}" if te_name else None
        yield WeightRule(f"{megatron}.{name}", sources, split, te_factor)


def _factor_source(source: Source, ending: str, shape: Shape) -> Source:
    return Source(source.name.removesuffix(".weight") + ending, shape)


def _is_linear(rule: WeightRule) -> bool:
    # Biases and norms inside linear layers have one dimension.
    return ".linear_" in rule.megatron_name and len(rule.sources[0].shape) == 2


def _module_name(source: Source) -> str:
    return source.name.removesuffix(".weight").replace("{e}.", "")


def _ends_with(module: str, target: str) -> bool:
    return f".{module}".endswith(f".{target}")
