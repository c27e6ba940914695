"""Refuses settings of the section `parallel` that a model cannot be trained with.

They are sizes that do not divide it, and `parallel.share_prompts` where it or another setting does
not allow that. No torch or Megatron."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models.attention_fields import KEY_VALUE_HEADS, attention_divisions
from megatron_r1.models.experts import expert_divisions
from megatron_r1.models.hf_config import HFConfig, model_family

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
