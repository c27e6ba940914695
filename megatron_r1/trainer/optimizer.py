"""Builds the optimizer: Adam over all model chunks, its state spread over data parallelism.

`optimizer.moments: bfloat16` keeps Adam's moments as DeepSeek-V3 does (arXiv 2412.19437 section
3.3.3), with master weights and gradients in fp32: 4 of the optimizer's 12 bytes per parameter are
saved. On a GPU Transformer Engine's Adam stores them so; on a CPU they are rounded after every
step, which gives the same numbers without the saving."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models import platform
from megatron_r1.models.build import process_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PRECISION_AWARE = {"use_precision_aware_optimizer": True, "store_param_remainders": False}
"""Fields that select Transformer Engine's Adam with states of its own dtypes. Master weights stored
as remainders of the bf16 parameters could not be loaded: its set_scaled_state then takes int16
only, and a checkpoint has them in fp32."""


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Return Adam over all chunks, with decoupled weight decay of all but norms and biases.

    Raises:
        UserError: this machine cannot do the moments or the offload.
    """
    settings, dtype = config.optimizer, config.model.dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=dtype == "bfloat16",
            params_dtype=getattr(torch, dtype),
            use_distributed_optimizer=True,
            overlap_param_gather=config.parallel.overlap_param_gather,
            **offload_fields(config),
            **moment_fields(config),
        ),
        chunks,
        # Only Megatron's older checkpoint formats send the state over gloo.
        use_gloo_process_groups=False,
        pg_collection=process_groups(chunks),
    )
    for group in optimizer.param_groups:
        # Megatron applies the multiplier, 0 of norms and biases, in a scheduler that is not used.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    round_moments(optimizer, config)
    return optimizer


def offload_fields(config: Config) -> dict[str, Any]:
    """Return the fields of Megatron's OptimizerConfig for `parallel.optimizer_offload`.

    Raises:
        UserError: a model in fp32, whose optimizer Megatron builds over views of its parameters,
            which torch refuses ("can't optimize a non-leaf Tensor").
    """
    fraction = config.parallel.optimizer_offload
    # Without a GPU all of it is in host memory already.
    if fraction == 0 or not platform.has_gpu():
        return {}
    if config.model.dtype == "float32":
        raise UserError(
            f"parallel.optimizer_offload={fraction} is not possible with model.dtype=float32: what "
            "is offloaded are master weights of 16-bit parameters; set model.dtype to bfloat16",
            key="parallel.optimizer_offload",
            cause=Cause.CONFLICT,
        )
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
        # The hybrid optimizer reads gradients from where this one leaves them
        # (optimizer/cpu_offloading/hybrid_optimizer.py:102, Megatron-Core 0.19.2).
        **_PRECISION_AWARE,
    }


def moment_fields(config: Config) -> dict[str, Any]:
    """Return the fields of Megatron's OptimizerConfig for `optimizer.moments`.

    Raises:
        UserError: moments in bfloat16 together with an offload.
    """
    if config.optimizer.moments == "float32" or not platform.has_gpu():
        return {}
    if config.parallel.optimizer_offload:
        raise UserError(
            "optimizer.moments=bfloat16 is not possible with parallel.optimizer_offload="
            f"{config.parallel.optimizer_offload}: what is offloaded is updated in fp32; use one "
            "of the two",
            key="optimizer.moments",
            cause=Cause.CONFLICT,
        )
    dtypes = {f"{name}_dtype": torch.bfloat16 for name in _MOMENTS}
    return {**_PRECISION_AWARE, **dtypes}


def round_moments(optimizer: Any, config: Config) -> None:
    """Make `optimizer` round bf16 moments after every step, on a CPU."""
    if config.optimizer.moments == "float32" or platform.has_gpu():
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.optimizer.register_step_post_hook(_round_moments)


def _round_moments(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for state in optimizer.state.values():
        for name in _MOMENTS:
            state[name].copy_(state[name].bfloat16())
