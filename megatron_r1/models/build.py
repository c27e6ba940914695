"""Builds this rank's part of a model."""

from collections.abc import Sequence

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_r1.models import patches
from megatron_r1.models.attention_fields import model_arguments, rope_scaling, yarn_scaling
from megatron_r1.models.gradients import correct_attributes
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.rotary import set_yarn
from megatron_r1.models.score_model import ScoreModel
from megatron_r1.models.specs import block_specs

LATENT_EPSILON = 1e-6


def build_model(
    hf: dict,
    config: TransformerConfig,
    groups: ProcessGroupCollection | None = None,
    *,
    vp_stage: int | None = None,
) -> PolicyModel | ScoreModel:
    """Return this rank's pipeline stage (of virtual stage `vp_stage`) with Megatron's random
    weights.

    The model maps input_ids and position_ids, (b, s) int64, to hidden states (b, s, h) or, with a
    score head, scores (b, s) fp32, on the last stage; earlier stages return (s, b, h), Megatron's
    order. groups: Megatron's process groups, which agree with `config`; None: those of its
    `parallel_state`. The vocabulary is padded to a multiple of the tensor-parallel size (see
    `vocab_shard`). Raises RuntimeError before `patches.install()`."""
    patches.check_installed()
    groups = groups or ProcessGroupCollection.use_mpu_process_groups()
    block, mtp = block_specs(config, vp_stage=vp_stage)
    tensor_parallel = config.tensor_model_parallel_size
    num_virtual = config.virtual_pipeline_model_parallel_size
    kind = ScoreModel if has_score_head(hf) else PolicyModel
    built = kind(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=mtp,
        vocab_size=-(-hf["vocab_size"] // tensor_parallel) * tensor_parallel,
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=is_vp_first_stage(vp_stage, num_virtual) and is_pp_first_stage(groups.pp),
        post_process=is_vp_last_stage(vp_stage, num_virtual) and is_pp_last_stage(groups.pp),
        parallel_output=True,
        pg_collection=groups,
        vp_stage=vp_stage,
        **model_arguments(hf),
    )
    built.unpadded_vocab_size = hf["vocab_size"]
    correct_attributes(built, config)
    if config.multi_latent_attention:
        _set_latent_epsilon(built)
    scaling = rope_scaling(hf)
    if scaling:
        rotary = built.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)
    if yarn := yarn_scaling(hf):
        set_yarn(built, **yarn)
    return built


def process_groups(chunks: Sequence) -> ProcessGroupCollection:
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


def freeze_mtp(model: PolicyModel) -> None:
    """Exclude the MTP layers from training; call before wrapping in DistributedDataParallel.

    For RL, which has no labels for them: weight decay would still shrink parameters without
    gradients."""
    model = unwrap_model(model)
    if getattr(model, "mtp", None) is not None:
        model.mtp.requires_grad_(False)
