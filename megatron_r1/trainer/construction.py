"""Builds a trainer rank's model chunks and gradient buffers; called on every rank together."""

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

from megatron_r1 import models
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.models import fp8, platform, weights
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.score_model import ScoreModel
from megatron_r1.models.weights.adapters.attach import attach_adapters
from megatron_r1.models.weights.rules import SCORE
from megatron_r1.models.weights.stored.dcp_reading import DistributedCheckpoint
from megatron_r1.trainer.checkpoints import finding, loading
from megatron_r1.trainer.optimizer import new_optimizer


def network(
    config: Config,
    hf: dict,
    transformer: TransformerConfig,
    groups: ProcessGroupCollection,
    score_std: float | None = None,
) -> tuple[list[PolicyModel | ScoreModel], list[DistributedDataParallel], MegatronOptimizer]:
    """Return `model_chunks`, the same chunks in Megatron's DistributedDataParallel, and their
    optimizer. Sets the functions of `transformer` by which Megatron's schedule reduces gradients.
    """
    chunks = model_chunks(config, hf, transformer, groups, score_std)
    overlap = config.parallel.overlap_param_gather
    wrapped = _with_gradients(transformer, chunks, groups, overlap)
    optimizer = new_optimizer(config, wrapped)
    transformer.grad_scale_func = optimizer.scale_loss  # read by Megatron's schedule
    return chunks, wrapped, optimizer


def model_chunks(
    config: Config,
    hf: dict,
    transformer: TransformerConfig,
    groups: ProcessGroupCollection,
    score_std: float | None = None,
) -> list[PolicyModel | ScoreModel]:
    """Return this rank's chunks, one per virtual pipeline stage, with their initial weights.

    score_std: standard deviation of a new score head; None: 1 / sqrt(hidden_size + 1) (arXiv
    2009.01325), which gives scores of about unit variance behind the final norm."""
    num_chunks = transformer.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(num_chunks) if num_chunks else [None]:
        chunk = models.build_model(hf, transformer, groups, vp_stage=stage)
        fp8.apply(chunk, config.fp8)
        if config.model.mtp == "frozen":
            models.freeze_mtp(chunk)
        chunks.append(chunk.to(platform.device()))
    if config.model.init == "random":
        weights.initialize(chunks, hf, std=config.model.init_std, seed=config.run.seed)
        return chunks
    # Before anything reads it: a flipped bit in a weight would train without an error.
    if config.model.checkpoint:
        _verify(Path(config.model.checkpoint), config)
    body = language_body(config, hf)
    if config.model.checkpoint:
        weights.load_megatron(chunks, hf, config.model.checkpoint, body)
    else:
        weights.load_hf(chunks, hf, config.model.path, body)
    if body is not None:
        std = (hf["hidden_size"] + 1) ** -0.5 if score_std is None else score_std
        weights.initialize_score(chunks, hf, std=std, seed=config.run.seed)
    if config.model.lora is not None:
        attach_adapters(chunks, hf, config.model.lora, config.run.seed)
    return chunks


def language_body(config: Config, hf: dict) -> dict | None:
    """Return the configuration of the language model whose body the score model `hf` starts from,
    with a new head; None for a model that is loaded as it is, or starts from random weights."""
    if not has_score_head(hf) or config.model.init == "random":
        return None
    own = models.read_hf_config(config.model.path, None)
    if config.model.checkpoint:
        return None if SCORE in DistributedCheckpoint(config.model.checkpoint).shapes else own
    return None if has_score_head(own) else own


def _verify(checkpoint: Path, config: Config) -> None:
    """Raise UserError, on every rank, where `checkpoint` differs from its manifest."""
    if finding.check_start(checkpoint) is not None:
        return  # there is no manifest
    if faults := loading.damage(checkpoint, config.checkpoint.verify):
        raise UserError(
            f"model.checkpoint: {checkpoint} is damaged: {'; '.join(faults[:5])}; put a good copy "
            "there, or load it as it is with checkpoint.verify: none",
            key="model.checkpoint",
            cause=Cause.MALFORMED,
        )


def _with_gradients(
    transformer: TransformerConfig,
    chunks: list[PolicyModel | ScoreModel],
    groups: ProcessGroupCollection,
    overlap_param_gather: bool,
) -> list[DistributedDataParallel]:
    settings = DistributedDataParallelConfig(
        # Sums of bf16 gradients over many micro-batches and ranks would lose the small ones.
        grad_reduce_in_fp32=transformer.params_dtype != torch.float32,
        use_distributed_optimizer=True,
        # Megatron gathers in the background only what it has reduced in the background.
        overlap_grad_reduce=platform.has_gpu() or overlap_param_gather,
        overlap_param_gather=overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(transformer, settings, chunk, pg_collection=groups)
        for chunk in chunks
    ]
    for chunk in wrapped:
        chunk.broadcast_params()  # over data parallelism: replicas start from the same bits
    no_sync = [chunk.no_sync for chunk in wrapped]
    transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    transformer.finalize_model_grads_func = finalize_model_grads
    return wrapped
