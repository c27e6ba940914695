"""Builds this rank's part of a model: a stage of a `PolicyModel`, or with a score head of a
`ScoreModel`. It has what Megatron's GPTModel lacks of the architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.utils import unwrap_model

from megatron_r1.models import patches
from megatron_r1.models.attention_fields import model_arguments
from megatron_r1.models.gradients import correct_attributes
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.layer_specs import block_specs
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.rotary_fields import rope_scaling, yarn_scaling
from megatron_r1.models.score_model import ScoreModel

LATENT_EPSILON = 1e-6


def build_model(
    hf_config: HFConfig,
    config: TransformerConfig,
    groups: ProcessGroupCollection | None = None,
    *,
    vp_stage: int | None = None,
    shares_prompts: bool = False,
) -> PolicyModel | ScoreModel:
    """Return this rank's pipeline stage (of virtual stage `vp_stage`) with Megatron's random
    weights.

    The model maps input_ids and position_ids, (b, s) int64, to hidden states (b, s, h) or, with a
    score head, scores (b, s) fp32, on the last stage; earlier stages return (s, b, h), Megatron's
    order. The vocabulary is padded to a multiple of the tensor-parallel size (see `vocab_shard`).

    Args:
        hf_config: the model's `config.json`.
        config: Megatron's configuration of the model.
        groups: Megatron's process groups, which agree with `config`; None: those of its
            `parallel_state`.
        vp_stage: the virtual stage; None without virtual stages.
        shares_prompts: whether batches may have shared prefixes (`models.shared_prefixes`).

    Raises:
        RuntimeError: before `patches.install()`."""
    patches.check_installed()
    groups = groups or ProcessGroupCollection.use_mpu_process_groups()
    block, mtp = block_specs(config, vp_stage=vp_stage, shares_prompts=shares_prompts)
    tensor_parallel = config.tensor_model_parallel_size
    num_virtual = config.virtual_pipeline_model_parallel_size
    yarn = yarn_scaling(hf_config)
    if yarn:
        # Megatron's attention, when it is built, reads this, and multiplies by 1 + ln(factor) / 10.
        config.yarn_rotary_scaling_factor = yarn["factor"]
    kind = ScoreModel if has_score_head(hf_config) else PolicyModel
    built_model = kind(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=mtp,
        vocab_size=-(-hf_config["vocab_size"] // tensor_parallel) * tensor_parallel,
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=is_vp_first_stage(vp_stage, num_virtual) and is_pp_first_stage(groups.pp),
        post_process=is_vp_last_stage(vp_stage, num_virtual) and is_pp_last_stage(groups.pp),
        parallel_output=True,
        pg_collection=groups,
        vp_stage=vp_stage,
        **model_arguments(hf_config),
    )
    built_model.unpadded_vocab_size = hf_config["vocab_size"]
    correct_attributes(built_model, config)
    if config.multi_latent_attention:
        _set_latent_epsilon(built_model)
    scaling = rope_scaling(hf_config)
    if scaling:
        rotary = built_model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
    if yarn:
        _set_yarn(built_model, **yarn)
    return built_model


def process_groups(chunks: Sequence[torch.nn.Module]) -> ProcessGroupCollection:
    """Return the process groups that a model's chunks, bare or wrapped, were built with."""
    return unwrap_model(chunks[0]).pg_collection


def _set_latent_epsilon(model: PolicyModel | ScoreModel) -> None:
    """Give the norms of latent attention their own epsilon; Megatron gives all norms one.

    All released models with latent attention have this value there, and do not read rms_norm_eps
    (modeling_deepseek.py of DeepSeek-V2, V3, Moonlight and Kimi-K2; transformers' classes)."""
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            # Transformer Engine has the norms in the projections behind them.
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                part = getattr(module, name, None)
                if part is not None and hasattr(part, "eps"):
                    part.eps = LATENT_EPSILON


def _set_yarn(
    model: GPTModel,
    *,
    factor: float,
    rope_theta: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> None:
    """Scale the angles of a model by YaRN (arXiv 2309.00071), before its first use,
    as transformers does.

    Args:
        model: changed in place.
        factor: how many times longer the context becomes.
        rope_theta: the base of the angles.
        original_max_position_embeddings: the context before, in tokens.
        beta_fast: rotations over that context from which a dimension stays as it is.
        beta_slow: rotations up to which a dimension is divided by `factor`.
        truncate: whether these limits are rounded to whole dimensions."""
    rotary = model.rotary_pos_emb
    size = 2 * len(rotary.inv_freq)
    low, high = yarn_rotary_pos_embedding._yarn_find_correction_range(
        beta_fast, beta_slow, size, rope_theta, original_max_position_embeddings, truncate
    )
    ramp = yarn_rotary_pos_embedding._yarn_linear_ramp_mask(
        low, high, size // 2, rotary.inv_freq.device
    )
    rotary.inv_freq = rotary.inv_freq * (1 - ramp) + rotary.inv_freq / factor * ramp
