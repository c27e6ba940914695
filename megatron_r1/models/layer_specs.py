"""The modules that a model's layers are made of: Megatron's own, with those of `layers` where they
are needed."""

import copy

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.models.attention import CoreAttention
from megatron_r1.models.layers import ExpertOutput, LatentAttention, RMSNorm


def block_specs(
    config: TransformerConfig, *, vp_stage: int | None = None, shares_prompts: bool = False
) -> tuple[TransformerBlockSubmodules, MultiTokenPredictionBlockSubmodules | None]:
    """Return this stage's decoder spec and, where the stage holds MTP layers, their spec, or None.

    Args:
        config: Megatron's. With transformer_impl "transformer_engine" the layers are Megatron's
            Transformer Engine classes as they are, but for the attention of a model that shares
            prompts; with "local" Megatron's own linear layers, our RMSNorm and CoreAttention.
        vp_stage: the virtual pipeline stage; None without virtual stages.
        shares_prompts: whether responses of one prompt attend to one copy of it."""
    transformer_engine = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config, transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not transformer_engine:
        block = TransformerBlockSubmodules(
            layer_specs=[_local_layer(spec) for spec in block.layer_specs], layer_norm=RMSNorm
        )
    elif shares_prompts:
        # Not at the top: its base class is there with Transformer Engine only.
        from megatron_r1.models.te_prefix_attention import SharedPrefixAttention

        for spec in block.layer_specs:
            attention = spec.submodules.self_attention.submodules
            attention.core_attention = SharedPrefixAttention
    if not config.mtp_num_layers:
        return block, None
    mtp = get_gpt_mtp_block_spec(
        config, _last_layer(config, transformer_engine), transformer_engine, vp_stage=vp_stage
    )
    for spec in mtp.layer_specs if mtp is not None and not transformer_engine else []:
        parts = spec.submodules
        parts.enorm = parts.hnorm = parts.layer_norm = RMSNorm
    return block, mtp


def _last_layer(config: TransformerConfig, transformer_engine: bool) -> ModuleSpec:
    """Return the last decoder layer's spec, which MTP layers follow, on any stage."""
    layers = get_gpt_decoder_layer_specs(config, transformer_engine, normalization="RMSNorm")
    return layers[-1] if transformer_engine else _local_layer(layers[-1])


def _local_layer(spec: ModuleSpec) -> ModuleSpec:
    spec = copy.deepcopy(spec)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if layer.self_attention.module is MLASelfAttention:
        layer.self_attention.module = LatentAttention
    attention.core_attention = CoreAttention
    for norm in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, norm, None) not in (None, IdentityOp):
            setattr(attention, norm, RMSNorm)
    if layer.mlp.func is MoELayer:
        # Megatron's map names this norm as if it were fused with a dense MLP, which experts have
        # not: Transformer Engine's layers save it under its own name.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        experts = layer.mlp.keywords["submodules"].experts
        experts.keywords["submodules"].linear_fc2 = ExpertOutput
    return spec
