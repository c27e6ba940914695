"""Builds a trainer rank's model chunks and gradient buffers, and their optimizer
(`trainer.optimizer`); called on every rank together."""

from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_r1 import models
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models import fp8_emulation, platform, weights
from megatron_r1.models.gradients import fp32_main_grad, skip_zero_gradients
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.score_model import ScoreModel
from megatron_r1.models.weights.adapters import attach_adapters
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.models.weights.table import SCORE
from megatron_r1.trainer.checkpoints import checkpoint_folders, contents
from megatron_r1.trainer.optimizer import build_optimizer


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
    optimizer = build_optimizer(config, wrapped_chunks)
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
        fp8_emulation.prepare_fp8_model(chunk, config.fp8)
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
    if checkpoint_folders.verify_initial_checkpoint(checkpoint) is not None:
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
