"""What `parallel.overlap_expert_exchange` needs of a model and of the other settings: checked
before anything starts. No torch or Megatron.

Most conditions are Megatron's own (TransformerConfig.__post_init__, Megatron-Core 0.16.1), which
are assertions there; `models.schedule_plan` has the schedule."""

from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models.hf_config import num_mtp_layers
from megatron_r1.models.pipeline_stages import parse_layout

KEY = "parallel.overlap_expert_exchange"


class Obstacle(NamedTuple):
    """A setting with which the exchange cannot be overlapped.

    Attributes:
        setting: its key and value.
        why: the reason.
        remedy: what to set instead."""

    setting: str
    why: str
    remedy: str


def check_exchange_overlap(config: Config, hf: dict) -> None:
    """Raise UserError where `parallel.overlap_expert_exchange` is set and cannot be done.

    Args:
        config: the recipe.
        hf: the model's `config.json`."""
    if not config.parallel.overlap_expert_exchange:
        return
    for obstacle in obstacles(config, hf):
        raise UserError(
            f"{KEY}: true is not possible with {obstacle.setting}: {obstacle.why}; "
            f"{obstacle.remedy}, or set {KEY}: false",
            key=KEY,
            cause=Cause.CONFLICT,
        )


def obstacles(config: Config, hf: dict) -> Iterator[Obstacle]:
    """Yield what prevents the overlap of `config`, whether or not it is asked for.

    Args:
        config: the recipe.
        hf: the model's `config.json`."""
    parallel = config.parallel
    if not hf.get("n_routed_experts"):
        name = (hf.get("architectures") or ["this model"])[0]
        yield Obstacle(f"the model {name}", "it has no routed experts", "take one that has")
        return
    if parallel.expert == 1:
        yield Obstacle(
            "parallel.expert: 1",
            "all experts are on each rank, and no token is sent",
            "spread them over ranks",
        )
    chunks = parallel.virtual_pipeline
    if parallel.pipeline_layout:
        chunks = len(parse_layout(parallel.pipeline_layout)) // parallel.pipeline
    if parallel.pipeline > 1 and chunks == 1:
        yield Obstacle(
            f"parallel.pipeline: {parallel.pipeline} and one chunk on each rank",
            "Megatron combines the passes of two micro-batches in its interleaved schedule only",
            "set parallel.virtual_pipeline above 1, or a pipeline_layout with more stages",
        )
    yield from _of_recomputation(config)
    if config.model.dtype == "float32":
        yield Obstacle(
            "model.dtype: float32",
            "Megatron combines passes in 16 bits only",
            "set model.dtype: bfloat16",
        )
    mtp = num_mtp_layers(hf) if config.model.mtp != "none" else 0
    if mtp > 1 or (mtp and parallel.pipeline == 1):
        yield Obstacle(
            f"model.mtp: {config.model.mtp}, {mtp} MTP layers and parallel.pipeline: "
            f"{parallel.pipeline}",
            "Megatron allows one MTP layer, and only with pipeline ranks",
            "set model.mtp: none",
        )


def _of_recomputation(config: Config) -> Iterator[Obstacle]:
    parallel = config.parallel
    if parallel.recompute == "full":
        yield Obstacle(
            "parallel.recompute: full",
            "a layer that is computed again as a whole cannot be cut where tokens are sent",
            "set parallel.recompute: selective with recompute_modules (megatron-r1 plan compares "
            "the memory of both)",
        )
    if parallel.recompute == "selective" and "moe" in parallel.recompute_modules:
        yield Obstacle(
            "'moe' in parallel.recompute_modules",
            "its recomputation would send the tokens again",
            "name moe_act and shared_experts instead",
        )
