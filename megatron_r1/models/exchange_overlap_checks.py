"""Refuses `parallel.overlap_expert_exchange` where the model or another setting does not allow it.

Most conditions are Megatron's own (TransformerConfig.__post_init__, Megatron-Core 0.19.2), which
are assertions there; `models.expert_exchange_overlap` has the schedule. No torch or Megatron."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models.hf_config import HFConfig, num_mtp_layers
from megatron_r1.models.pipeline_stages import num_chunks

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
    if mtp > 1:
        yield OverlapConflict(
            f"model.mtp: {config.model.mtp} and {mtp} MTP layers",
            "Megatron allows one MTP layer",
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
