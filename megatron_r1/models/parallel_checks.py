"""Refuses settings of the section `parallel` that a model cannot be trained with.

They are sizes that do not divide it, and `parallel.share_prompts` and
`parallel.overlap_expert_exchange` where it or another setting does not allow them. No torch or
Megatron.

Most conditions of `check_exchange_overlap` are Megatron's own (TransformerConfig.__post_init__,
Megatron-Core 0.16.1), which are assertions there; `models.expert_exchange_overlap` has the
schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models.attention_fields import KEY_VALUE_HEADS, attention_divisions
from megatron_r1.models.experts import expert_divisions
from megatron_r1.models.hf_config import HFConfig, model_family, num_mtp_layers
from megatron_r1.models.pipeline_stages import num_chunks

if TYPE_CHECKING:
    from megatron_r1.config import ParallelConfig

_UNSUPPORTED_AXIS_REASONS = {
    "context": "the ring of ranks has neither windows nor learned softmax offsets",
    "expert_tensor": "each of the ranks that share an expert would add its bias",
}


def check_divisions(
    hf_config: HFConfig, parallel: ParallelConfig, transformer_engine: bool
) -> None:
    """Raise UserError for sizes of `parallel` that do not divide the model, or that only experts
    could have.

    Args:
        hf_config: the model's `config.json`.
        parallel: the recipe's section.
        transformer_engine: whether the layers are Transformer Engine's; others need more divisions.
    """
    for key in () if hf_config.get("n_routed_experts") else ("expert", "expert_tensor"):
        if (ranks := getattr(parallel, key)) > 1:
            raise UserError(
                f"parallel.{key}={ranks} needs a model with experts; use 1",
                key=f"parallel.{key}",
                cause=Cause.CONFLICT,
            )
    family = model_family(hf_config)
    is_refused_by_key = {
        "context": family.attention_sinks or family.sliding_windows,
        "expert_tensor": family.linear_biases,
    }
    for key, is_refused in is_refused_by_key.items():
        if is_refused and (ranks := getattr(parallel, key)) > 1:
            raise UserError(
                f"parallel.{key}={ranks} is not supported for {hf_config['architectures'][0]}"
                f" ({_UNSUPPORTED_AXIS_REASONS[key]}); use 1",
                key=f"parallel.{key}",
                cause=Cause.UNSUPPORTED,
            )
    divisions = [
        *attention_divisions(hf_config, transformer_engine),
        ("intermediate_size", hf_config["intermediate_size"], "tensor"),
        *expert_divisions(hf_config),
    ]
    for field, size, key in divisions:
        ranks = getattr(parallel, key)
        is_shared = field == KEY_VALUE_HEADS  # by several ranks, if there are more ranks than heads
        if size % ranks and not (is_shared and ranks % size == 0):
            raise UserError(
                f"parallel.{key}={ranks} does not divide {field}={size}; choose a divisor "
                f"{'or a multiple ' if is_shared else ''}of {size}",
                key=f"parallel.{key}",
                cause=Cause.INDIVISIBLE,
            )


def check_shared_prompts(config: Config, is_plain: bool) -> None:
    """Raise UserError where `parallel.share_prompts` does not go with the model or a setting.

    Args:
        config: the recipe.
        is_plain: whether attention has neither windows nor softmax offsets."""
    if not config.parallel.share_prompts:
        return
    obstacles = {
        f"parallel.context: {config.parallel.context}": config.parallel.context > 1,
        "a model with attention windows or softmax offsets": not is_plain,
        "rl.routing_replay": config.rl.routing_replay,
        "model.mtp: train": config.model.mtp == "train",
        "model.expert_bias_update_rate, which counts tokens": config.model.expert_bias_update_rate
        > 0,
    }
    if obstacle_names := [name for name, is_there in obstacles.items() if is_there]:
        raise UserError(
            f"parallel.share_prompts: true does not go with {obstacle_names[0]}; leave it out",
            key="parallel.share_prompts",
            cause=Cause.CONFLICT,
        )


OVERLAP_KEY = "parallel.overlap_expert_exchange"


class OverlapConflict(NamedTuple):
    """A setting with which the exchange cannot be overlapped.

    Attributes:
        setting: its key and value.
        reason: why the exchange cannot be overlapped.
        remedy: what to set instead."""

    setting: str
    reason: str
    remedy: str


def check_exchange_overlap(config: Config, hf_config: HFConfig) -> None:
    """Raise UserError where `parallel.overlap_expert_exchange` is set and cannot be done.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`."""
    if not config.parallel.overlap_expert_exchange:
        return
    for conflict in overlap_conflicts(config, hf_config):
        raise UserError(
            f"{OVERLAP_KEY}: true is not possible with {conflict.setting}: {conflict.reason}; "
            f"{conflict.remedy}, or set {OVERLAP_KEY}: false",
            key=OVERLAP_KEY,
            cause=Cause.CONFLICT,
        )


def overlap_conflicts(config: Config, hf_config: HFConfig) -> Iterator[OverlapConflict]:
    """Yield what prevents the overlap of `config`, whether or not it is asked for.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`."""
    parallel = config.parallel
    if not hf_config.get("n_routed_experts"):
        name = (hf_config.get("architectures") or ["this model"])[0]
        yield OverlapConflict(f"the model {name}", "it has no routed experts", "take one that has")
        return
    if parallel.expert == 1:
        yield OverlapConflict(
            "parallel.expert: 1",
            "all experts are on each rank, and no token is sent",
            "spread them over ranks",
        )
    if parallel.pipeline > 1 and num_chunks(parallel) == 1:
        yield OverlapConflict(
            f"parallel.pipeline: {parallel.pipeline} and one chunk on each rank",
            "Megatron combines the passes of two micro-batches in its interleaved schedule only",
            "set parallel.virtual_pipeline above 1, or a pipeline_layout with more stages",
        )
    yield from _recomputation_conflicts(config)
    if config.model.dtype == "float32":
        yield OverlapConflict(
            "model.dtype: float32",
            "Megatron combines passes in 16 bits only",
            "set model.dtype: bfloat16",
        )
    mtp = num_mtp_layers(hf_config) if config.model.mtp != "none" else 0
    if mtp > 1 or (mtp and parallel.pipeline == 1):
        yield OverlapConflict(
            f"model.mtp: {config.model.mtp}, {mtp} MTP layers and parallel.pipeline: "
            f"{parallel.pipeline}",
            "Megatron allows one MTP layer, and only with pipeline ranks",
            "set model.mtp: none",
        )


def _recomputation_conflicts(config: Config) -> Iterator[OverlapConflict]:
    parallel = config.parallel
    if parallel.recompute == "full":
        yield OverlapConflict(
            "parallel.recompute: full",
            "a layer that is computed again as a whole cannot be cut where tokens are sent",
            "set parallel.recompute: selective with recompute_modules (megatron-r1 plan compares "
            "the memory of both)",
        )
    if parallel.recompute == "selective" and "moe" in parallel.recompute_modules:
        yield OverlapConflict(
            "'moe' in parallel.recompute_modules",
            "its recomputation would send the tokens again",
            "name moe_act and shared_experts instead",
        )
