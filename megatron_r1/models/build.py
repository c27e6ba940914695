"""Builds this rank's part of a model."""

from collections.abc import Sequence

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_r1.models.acceleration import allow_fused_gradients
from megatron_r1.models.attention_fields import model_arguments, rope_scaling, yarn_scaling
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.layers import block_specs
from megatron_r1.models.policy_model import PolicyModel
from megatron_r1.models.rotary import patch_rotary_embedding, set_yarn
from megatron_r1.models.routing import patch_routing
from megatron_r1.models.score_model import ScoreModel

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
    `vocab_shard`)."""
    groups = groups or ProcessGroupCollection.use_mpu_process_groups()
    patch_rotary_embedding()
    patch_routing()
    if config.gradient_accumulation_fusion:
        allow_fused_gradients()
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
    _mark_experts(built)
    _mark_sinks(built)
    if config.multi_latent_attention:
        _set_latent_epsilon(built)
        _mark_replicated(built)
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


def _mark_experts(model: PolicyModel | ScoreModel) -> None:
    """Have experts' gradients summed over the right ranks, and all counted in their norm.

    Sum: Megatron marks experts (`allreduce` False) only when expert_parallel > 1
    (tensor_parallel/layers.py). With tensor_parallel 2 and both expert sizes 1, two ranks hold the
    same experts and see different tokens, and their gradients would not be summed. Norm: Megatron
    counts a parameter on the first tensor rank only, unless it is marked as split. No tensor rank
    has another's experts or another's part of their gradients; Megatron's own layers are marked,
    Transformer Engine's grouped ones are not."""
    config = model.config
    if not config.num_moe_experts:
        return
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.tensor_model_parallel = True
            if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
                parameter.allreduce = False
                # Megatron marks the bias of an expert's second layer, whose gradient would be
                # summed over the tensor group once more.
                parameter.sequence_parallel = False


def _mark_sinks(model: PolicyModel | ScoreModel) -> None:
    """Mark the softmax offsets as split over the tensor group, which Megatron's attention does not:
    the gradient's norm would count those of the first rank only."""
    for name, parameter in model.named_parameters():
        if name.endswith(".softmax_offset"):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)


def _mark_replicated(model: PolicyModel | ScoreModel) -> None:
    """Have the norm of the gradients count the down-projections of latent attention once.

    They are whole on every tensor rank, but Transformer Engine marks the weights of all its linear
    layers as split (pytorch/module/linear.py:2297, 2.20.2), and Megatron's norm adds up what is
    split: with tensor_parallel 2 it was 11% too large on a small model, and gradients were clipped
    by as much too early."""
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            for name in ("linear_q_down_proj", "linear_kv_down_proj"):
                if hasattr(module, name):
                    getattr(module, name).weight.tensor_model_parallel = False


def _set_latent_epsilon(model: PolicyModel | ScoreModel) -> None:
    """Give the norms of latent attention the epsilon of all released models with it, which do not
    read rms_norm_eps there (modeling_deepseek.py of DeepSeek-V2, V3, Moonlight and Kimi-K2;
    transformers' classes). Megatron gives all norms the same."""
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
