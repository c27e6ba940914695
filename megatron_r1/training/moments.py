"""Adam's moments in bf16, as DeepSeek-V3 keeps them (arXiv 2412.19437 section 3.3.3).

Master weights and gradients stay fp32, there and here. That saves 4 of the 12 bytes a parameter has
in the optimizer. On a GPU Transformer Engine's Adam stores them so; elsewhere they
are rounded after every step, which is the same numbers without the saving."""

from __future__ import annotations

from typing import Any

import torch

from megatron_r1 import platform
from megatron_r1.config import Config

_MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_fields(config: Config) -> dict[str, Any]:
    """What Megatron's OptimizerConfig is told. Raises ValueError for what it cannot do."""
    if config.optimizer.moments == "float32" or not platform.has_gpu():
        return {}
    if not platform.uses_transformer_engine():
        raise ValueError(
            "optimizer.moments=bfloat16 needs Transformer Engine, whose Adam stores them; use "
            "float32"
        )
    if config.parallel.optimizer_offload:
        raise ValueError(
            "optimizer.moments=bfloat16 is not possible with parallel.optimizer_offload="
            f"{config.parallel.optimizer_offload}: what is offloaded is updated in fp32; use one "
            "of the two"
        )
    dtypes = {f"{name}_dtype": torch.bfloat16 for name in _MOMENTS}
    return {"use_precision_aware_optimizer": True, **dtypes}


def round_moments(optimizer: Any, config: Config) -> None:
    """Without a GPU: have Megatron's `optimizer` round its moments after every step, if asked."""
    if config.optimizer.moments == "float32" or platform.has_gpu():
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.optimizer.register_step_post_hook(_round)


def _round(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    for state in optimizer.state.values():
        for name in _MOMENTS:
            state[name].copy_(state[name].bfloat16())
