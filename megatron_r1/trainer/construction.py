"""Builds a trainer rank's model chunks, gradient buffers and optimizer; called on every rank
together.

The optimizer is Adam over all model chunks, its state spread over data parallelism.
`optimizer.moments: bfloat16` keeps Adam's moments as DeepSeek-V3 does (arXiv 2412.19437 section
3.3.3), with master weights and gradients in fp32: 4 of the optimizer's 12 bytes per parameter are
saved. On a GPU Transformer Engine's Adam stores them so; on a CPU they are rounded after every
step, which gives the same numbers without the saving."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_r1 import models
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models import fp8, platform, weights
from megatron_r1.models.build import process_groups
from megatron_r1.models.gradients import fp32_main_grad, skip_zero_gradients
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.score_model import ScoreModel
from megatron_r1.models.weights.adapters import attach_adapters
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.models.weights.table import SCORE
from megatron_r1.trainer.checkpoints import checkpoint_folders, contents

_MOMENTS = ("exp_avg", "exp_avg_sq")

_PRECISION_AWARE = {"use_precision_aware_optimizer": True, "store_param_remainders": False}
"""Fields that select Transformer Engine's Adam with states of its own dtypes. Master weights stored
as remainders of the bf16 parameters could not be loaded: its set_scaled_state then takes int16
only, and a checkpoint has them in fp32."""


def _new_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
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
        # (optimizer/cpu_offloading/hybrid_optimizer.py:102, Megatron-Core 0.16.1).
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


def build_network(
    config: Config,
    hf_config: HFConfig,
    transformer_config: TransformerConfig,
    groups: ProcessGroupCollection,
    score_std: float | None = None,
) -> tuple[list[PolicyModel | ScoreModel], list[DistributedDataParallel], MegatronOptimizer]:
    """Build this rank's part of a network and its optimizer.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`.
        transformer_config: Megatron's configuration of the model; the functions by which Megatron's
            schedule reduces gradients are set in it.
        groups: the process groups of this rank.
        score_std: standard deviation of a new score head; None: 1 / sqrt(hidden_size + 1).

    Returns:
        `build_chunks`, the same chunks in Megatron's DistributedDataParallel, and their optimizer.
    """
    chunks = build_chunks(config, hf_config, transformer_config, groups, score_std)
    overlap = config.parallel.overlap_param_gather
    wrapped_chunks = _with_gradients(transformer_config, chunks, groups, overlap)
    optimizer = _new_optimizer(config, wrapped_chunks)
    transformer_config.grad_scale_func = optimizer.scale_loss  # read by Megatron's schedule
    return chunks, wrapped_chunks, optimizer


def build_chunks(
    config: Config,
    hf_config: HFConfig,
    transformer_config: TransformerConfig,
    groups: ProcessGroupCollection,
    score_std: float | None = None,
) -> list[PolicyModel | ScoreModel]:
    """Return this rank's chunks, one per virtual pipeline stage, with their initial weights.

    Args:
        config: the recipe.
        hf_config: the model's `config.json`.
        transformer_config: Megatron's configuration of the model.
        groups: Megatron's process groups.
        score_std: standard deviation of a new score head; None: 1 / sqrt(hidden_size + 1) (arXiv
            2009.01325), which gives scores of about unit variance behind the final norm."""
    num_chunks = transformer_config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(num_chunks) if num_chunks else [None]:
        shares = config.parallel.share_prompts
        chunk = models.build_model(
            hf_config, transformer_config, groups, vp_stage=stage, shares_prompts=shares
        )
        fp8.prepare_fp8_model(chunk, config.fp8)
        if config.model.mtp == "frozen":
            models.freeze_mtp(chunk)
        chunks.append(chunk.to(platform.device()))
    if config.model.init == "random":
        weights.initialize_weights(
            chunks, hf_config, std=config.model.init_std, seed=config.run.seed
        )
        return chunks
    # Before anything reads it: a flipped bit in a weight would train without an error.
    if config.model.checkpoint:
        _verify_checkpoint(Path(config.model.checkpoint), config)
    body = body_hf_config(config, hf_config)
    if config.model.checkpoint:
        weights.load_megatron(chunks, hf_config, config.model.checkpoint, body)
    else:
        weights.load_hf(chunks, hf_config, config.model.path, body)
    if body is not None:
        std = (hf_config["hidden_size"] + 1) ** -0.5 if score_std is None else score_std
        weights.initialize_score_head(chunks, hf_config, std=std, seed=config.run.seed)
    if config.model.lora is not None:
        attach_adapters(chunks, hf_config, config.model.lora, config.run.seed)
    return chunks


def body_hf_config(config: Config, hf_config: HFConfig) -> HFConfig | None:
    """Return the configuration of the language model whose body a score model starts from.

    None for a model that is loaded as it is, or starts from random weights.

    Args:
        config: the recipe.
        hf_config: the score model's, whose head is then new."""
    if not has_score_head(hf_config) or config.model.init == "random":
        return None
    folder_hf_config = models.read_hf_config(config.model.path, None)
    if config.model.checkpoint:
        return (
            None
            if SCORE in DistributedCheckpoint(config.model.checkpoint).shapes
            else folder_hf_config
        )
    return None if has_score_head(folder_hf_config) else folder_hf_config


def _verify_checkpoint(checkpoint: Path, config: Config) -> None:
    """Raise UserError, on every rank, where `checkpoint` differs from its manifest."""
    if checkpoint_folders.check_initial_checkpoint(checkpoint) is not None:
        return  # there is no manifest
    if faults := contents.find_faults_on_all_ranks(checkpoint, config.checkpoint.verify):
        raise UserError(
            f"model.checkpoint: {checkpoint} is damaged: {'; '.join(faults[:5])}; put a good copy "
            "there, or load it as it is with checkpoint.verify: none",
            key="model.checkpoint",
            cause=Cause.MALFORMED,
        )


def _with_gradients(
    transformer_config: TransformerConfig,
    chunks: list[PolicyModel | ScoreModel],
    groups: ProcessGroupCollection,
    overlap_param_gather: bool,
) -> list[DistributedDataParallel]:
    settings = DistributedDataParallelConfig(
        # Sums of bf16 gradients over many micro-batches and ranks would lose the small ones.
        grad_reduce_in_fp32=transformer_config.params_dtype != torch.float32,
        use_distributed_optimizer=True,
        # Megatron gathers in the background only what it has reduced in the background.
        overlap_grad_reduce=platform.has_gpu() or overlap_param_gather,
        overlap_param_gather=overlap_param_gather,
    )
    wrapped_chunks = [
        DistributedDataParallel(transformer_config, settings, chunk, pg_collection=groups)
        for chunk in chunks
    ]
    for chunk in wrapped_chunks:
        model = unwrap_model(chunk)
        if isinstance(model, PolicyModel) and model.post_process:
            weight = models.lm_head_weight(model)
            if fp32_main_grad(weight) is not None:
                skip_zero_gradients(weight)
        chunk.broadcast_params()  # over data parallelism: replicas start from the same bits
    no_sync = [chunk.no_sync for chunk in wrapped_chunks]
    transformer_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    transformer_config.finalize_model_grads_func = finalize_model_grads
    return wrapped_chunks
