"""What a trainer rank is made of: Megatron's configuration, model chunks, gradient buffers and
optimizer, each from the recipe. Called on every rank together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from megatron_r1 import models, platform, weights
from megatron_r1.config import Config
from megatron_r1.models import fp8
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.score_model import ScoreModel
from megatron_r1.training.checkpoints import loading, starting
from megatron_r1.training.moments import moment_fields, round_moments
from megatron_r1.weights.rules import SCORE
from megatron_r1.weights.stored.dcp_reading import DistributedCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer(config: Config, hf: dict) -> TransformerConfig:
    """Megatron's configuration. Raises ValueError for a model or layout that cannot be."""
    parallel = config.parallel
    return models.transformer_config(
        hf,
        params_dtype=DTYPES[config.model.dtype],
        tensor_parallel=parallel.tensor,
        pipeline_parallel=parallel.pipeline,
        expert_parallel=parallel.expert,
        expert_tensor_parallel=parallel.expert_tensor,
        context_parallel=parallel.context,
        virtual_pipeline=parallel.virtual_pipeline,
        pipeline_layout=parallel.pipeline_layout,
        with_mtp=config.model.mtp != "none",
        expert_bias_update_rate=config.model.expert_bias_update_rate,
        recompute=parallel.recompute,
        recompute_modules=parallel.recompute_modules,
        **fp8.megatron_fields(config.fp8),
    )


def model_chunks(
    config: Config, hf: dict, transformer: TransformerConfig, score_std: float | None = None
) -> list[PolicyModel | ScoreModel]:
    """This rank's chunks, one per virtual pipeline stage, with the weights training starts from.

    score_std: of a score head that starts new; default 1 / sqrt(hidden_size + 1) (arXiv
    2009.01325): behind the final norm scores then begin with about unit variance.
    """
    num_chunks = transformer.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(num_chunks) if num_chunks else [None]:
        chunk = models.build_model(hf, transformer, vp_stage=stage)
        fp8.apply(chunk, config.fp8)
        if config.model.mtp == "frozen":
            models.freeze_mtp(chunk)
        chunks.append(chunk.to(platform.device()))
    if config.model.init == "random":
        weights.initialize(chunks, hf, std=config.model.init_std, seed=config.run.seed)
        return chunks
    if config.model.checkpoint:
        _verify(Path(config.model.checkpoint), config)
        body = language_body(config, hf)
        weights.load_megatron(chunks, hf, config.model.checkpoint, body)
    else:
        body = language_body(config, hf)
        weights.load_hf(chunks, hf, config.model.path, body)
    if body is not None:
        std = (hf["hidden_size"] + 1) ** -0.5 if score_std is None else score_std
        weights.initialize_score(chunks, hf, std=std, seed=config.run.seed)
    return chunks


def language_body(config: Config, hf: dict) -> dict | None:
    """The configuration of the language model whose body the score model `hf` starts from, with a
    new head; None for what is loaded as it is, or not at all."""
    if not has_score_head(hf) or config.model.init == "random":
        return None
    own = models.read_hf_config(config.model.path, None)
    if config.model.checkpoint:
        return None if SCORE in DistributedCheckpoint(config.model.checkpoint).shapes else own
    return None if has_score_head(own) else own


def _verify(checkpoint: Path, config: Config) -> None:
    """Raise ValueError, on every rank, where `checkpoint` is not what its manifest says."""
    starting.check_folder(checkpoint)
    if not starting.has_manifest(checkpoint):
        return
    if faults := loading.damage(checkpoint, config.checkpoint.verify):
        raise ValueError(
            f"model.checkpoint: {checkpoint} is damaged: {'; '.join(faults[:5])}; put a good copy "
            "there, or load it as it is with checkpoint.verify: none"
        )


def with_gradients(
    transformer: TransformerConfig, chunks: list[PolicyModel | ScoreModel]
) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers; `transformer` learns how their gradients are reduced."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=transformer.params_dtype != torch.float32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=platform.has_gpu(),
    )
    wrapped = [DistributedDataParallel(transformer, settings, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.broadcast_params()
    no_sync = [chunk.no_sync for chunk in wrapped]
    transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    transformer.finalize_model_grads_func = finalize_model_grads
    return wrapped


def new_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Adam with decoupled weight decay over all chunks, its state spread over data parallelism."""
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
            params_dtype=DTYPES[dtype],
            use_distributed_optimizer=True,
            **_offload(config.parallel.optimizer_offload),
            **moment_fields(config),
        ),
        chunks,
    )
    round_moments(optimizer, config)
    return optimizer


def _offload(share: float) -> dict[str, Any]:
    # Without a GPU all of it is in host memory already.
    if share == 0 or not platform.has_gpu():
        return {}
    if not platform.uses_transformer_engine():
        raise ValueError(
            f"parallel.optimizer_offload={share} needs Transformer Engine, whose Adam updates what "
            "stays on the GPU; set it to 0"
        )
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": share,
        "overlap_cpu_optimizer_d2h_h2d": True,
        # The hybrid optimizer reads gradients from where this one leaves them
        # (optimizer/cpu_offloading/hybrid_optimizer.py:102, Megatron-Core 0.16.1).
        "use_precision_aware_optimizer": True,
    }
