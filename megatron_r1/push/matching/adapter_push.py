"""Pushes of adapters alone (`push.adapter_only`): the factors that engines need, and the recipes
that cannot be pushed so. No torch.

vLLM gives each of its ranks a whole adapter and cuts it itself, so every rank of a pipeline stage
needs all factors of the stage's layers. Paths and lines are of vLLM 0.32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models.hf_config import HFConfig, model_family
from megatron_r1.models.weights.adapter_table import (
    PEFT_PREFIX,
    adapter_config,
    adapter_shapes,
    adapter_table,
)
from megatron_r1.models.weights.table import WeightTable
from megatron_r1.push.control_messages import AdapterSettings
from megatron_r1.push.matching.layouts import Coordinate, EngineLayout
from megatron_r1.push.matching.predicted_sharding import PredictedSharding
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import HFTensor, checkpoint_tensors

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `--max-lora-rank` (vllm/config/lora.py: MaxLoRARanks)."""

UNADAPTED_LATENT_MODULES = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Layers of latent attention without an adapter in vLLM. vLLM fuses the first two into one layer,
whose class supports LoRA on a single tensor rank only (lora/layers/column_parallel_linear.py:
`MergedColumnParallelLinearWithLoRA.can_replace_layer`), and multiplies the third into queries and
outputs when the model is loaded (attention/mla_attention.py: `process_weights_after_loading`), so
that an adapter of it would change nothing."""


class PredictedAdapterSharding(PredictedSharding):
    """The factors that the ranks of one engine need; `PredictedSharding` has the same of a model.

    Args:
        hf_config: the model's `config.json`.
        layout: the layout of all engines.
        weight_table: the weight table of the adapters.

    Raises:
        UserError: where vLLM cannot split the model so.
    """

    def __init__(self, hf_config: HFConfig, layout: EngineLayout, weight_table: WeightTable):
        super().__init__(hf_config, layout)
        self.weight_table, self._names = weight_table, adapter_shapes(weight_table).keys()

    def tensors(self, coordinate: Coordinate) -> Iterator[HFTensor]:
        """Yield the adapted tensors of the coordinate's pipeline stage."""
        return self._dense_tensors(coordinate.pipeline)

    def region(self, tensor: HFTensor, coordinate: Coordinate) -> Region:
        """Return the whole tensor: every rank of a stage receives it."""
        return Region.full(tensor.shape)

    def _dense_tensors(self, stage: int) -> Iterator[HFTensor]:
        for tensor in checkpoint_tensors(
            self.weight_table, {"layers"}, self._stage_layers[stage], ()
        ):
            if tensor.name in self._names:
                yield tensor

    def _experts_at(self, coordinate: Coordinate) -> Sequence[int]:
        return ()  # `check_adapter_push` refuses their adapters


def pushed_adapter_table(config: Config, hf_config: HFConfig) -> WeightTable | None:
    """Return the weight table of the adapters where these alone are pushed, else None."""
    if not config.push.adapter_only:
        return None
    assert config.model.lora is not None, "check_adapter_push() comes first"
    return adapter_table(hf_config, config.model.lora)


def engine_adapter(config: Config, hf_config: HFConfig) -> AdapterSettings | None:
    """Return what engines need to serve pushed factors as an adapter; None where whole weights are
    pushed."""
    if (table := pushed_adapter_table(config, hf_config)) is None:
        return None
    assert config.model.lora is not None
    settings = adapter_config(table, config.model.lora, config.model.path)
    return AdapterSettings(PEFT_PREFIX, settings)


def max_lora_rank(rank: int) -> int:
    """Return the least of vLLM's `--max-lora-rank` that adapters of this rank fit into.

    Raises:
        UserError: the rank is too large.
    """
    if rank > MAX_RANKS[-1]:
        raise UserError(
            f"model.lora.rank: {rank} is more than the {MAX_RANKS[-1]} that vLLM's LoRA layers "
            "have at most; lower it, or set push.adapter_only: false, which pushes merged weights",
            key="model.lora.rank",
            cause=Cause.TOO_LARGE,
        )
    return next(max_rank for max_rank in MAX_RANKS if rank <= max_rank)


def lora_arguments(config: Config, hf_config: HFConfig) -> dict[str, Any] | None:
    """Return vLLM's arguments for engines to which adapters are pushed, None for others. Of layers
    it takes the last parts of their names, and finds the fused ones itself."""
    if (table := pushed_adapter_table(config, hf_config)) is None:
        return None
    assert config.model.lora is not None
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": max_lora_rank(config.model.lora.rank),
        "lora_target_modules": sorted({name.split(".")[-3] for name in adapter_shapes(table)}),
    }


def check_adapter_push(config: Config, hf_config: HFConfig) -> None:
    """Refuse recipes whose adapters vLLM cannot serve next to the weights in `model.path`.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`.

    Raises:
        UserError: names the setting, its value and the remedy."""
    if not config.push.adapter_only:
        return
    if (lora := config.model.lora) is None:
        raise UserError(
            "push.adapter_only: there is no adapter without model.lora; set model.lora.rank, or "
            "push.adapter_only: false",
            key="push.adapter_only",
            cause=Cause.MISSING,
        )
    for setting, reason in _conflicting_settings(config, hf_config):
        raise UserError(
            f"push.adapter_only with {setting}: {reason}; change it, or set push.adapter_only: "
            "false, which pushes merged weights",
            key="push.adapter_only",
            cause=Cause.CONFLICT,
        )
    max_lora_rank(lora.rank)
    modules = {_factor_module(name) for name in adapter_shapes(adapter_table(hf_config, lora))}
    if refused_modules := sorted(filter(lambda module: _is_unserved(module, hf_config), modules)):
        served_text = ", ".join(sorted(modules.difference(refused_modules))) or "others"
        raise UserError(
            f"push.adapter_only: vLLM's LoRA serves no adapter of {', '.join(refused_modules)} in "
            f"{hf_config['architectures'][0]}; set model.lora.targets to {served_text}, or "
            "push.adapter_only: false, which pushes merged weights",
            key="model.lora.targets",
            cause=Cause.UNSUPPORTED,
        )


def _conflicting_settings(config: Config, hf_config: HFConfig) -> Iterator[tuple[str, str]]:
    """Yield (setting, reason) for what excludes a push of adapters alone."""
    rollout = config.rollout
    if config.push.fp8:
        yield "push.fp8: true", "the engines' own weights are not pushed, so nothing quantizes them"
    if rollout.colocated:
        yield (
            "rollout.colocated: true",
            "an engine that sleeps gives its memory away, and no push brings back the model's own "
            "weights",
        )
    if rollout.speculative.method == "mtp":
        yield (
            "rollout.speculative.method: mtp",
            "a drafter next to adapters has not been tried",
        )
    if rollout.redundant_experts:
        yield (
            f"rollout.redundant_experts: {rollout.redundant_experts}",
            "copies of experts are placed by pushes of them",
        )
    if config.model.checkpoint:
        yield (
            f"model.checkpoint: {config.model.checkpoint}",
            "engines read the weights under the adapters from model.path",
        )
    if "quantization_config" in hf_config:
        yield (
            f"model.path: {config.model.path}",
            "its weights are quantized, and the trainer computes with dequantized ones, so engines "
            "that read the folder would compute something else",
        )


def _factor_module(name: str) -> str:
    """Return a factor's layer as "self_attn.q_proj", an expert's without its number."""
    return ".".join(part for part in name.split(".")[3:-2] if not part.isdigit())


def _is_unserved(module: str, hf_config: HFConfig) -> bool:
    is_latent = (
        model_family(hf_config).latent_attention
        and module.rpartition(".")[2] in UNADAPTED_LATENT_MODULES
    )
    return is_latent or ".experts." in module
