"""Translates a Hugging Face configuration and a recipe into Megatron's TransformerConfig."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.models import fp8, platform
from megatron_r1.models.acceleration import acceleration_fields
from megatron_r1.models.hf_config import model_family
from megatron_r1.models.pipeline_stages import pipeline_stages, uneven_layout
from megatron_r1.models.supported import check_divisions, own_fields

RECOMPUTABLE = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def transformer_config(hf: dict, config: Config) -> TransformerConfig:
    """Return Megatron's configuration of the model `hf` (MLATransformerConfig for latent attention)
    by the sections model, parallel and fp8 of a recipe.

    Raises UserError for a configuration this stack would compute wrongly, for sizes that do not
    divide, and for FP8, fusions and kernels that this machine cannot run."""
    fields, parallel = own_fields(hf), config.parallel
    if config.model.mtp == "none":
        fields["mtp_num_layers"] = None
    has_experts = bool(fields.get("num_moe_experts"))
    transformer_engine = platform.uses_transformer_engine()
    check_divisions(hf, parallel, transformer_engine)
    fields |= _shared_fields(hf, getattr(torch, config.model.dtype), transformer_engine)
    fields |= _parallel_fields(parallel, has_experts)
    fields |= _pipeline_fields(parallel, hf["num_hidden_layers"], fields.get("mtp_num_layers") or 0)
    fields |= _recompute_fields(parallel, fields)
    fields |= fp8.megatron_fields(config.fp8)
    fields |= acceleration_fields(config, has_experts)
    if fields.get("softmax_type") and config.model.attention_backend == "flash":
        raise UserError(
            "model.attention_backend: flash has no learned softmax offsets, which "
            f"{hf['architectures'][0]} needs; use fused (cuDNN 9.18 or later) or auto",
            key="model.attention_backend",
            cause=Cause.UNSUPPORTED,
        )
    if has_experts:
        fields["moe_router_bias_update_rate"] = config.model.expert_bias_update_rate
        fields["moe_grouped_gemm"] = transformer_engine
    kind = MLATransformerConfig if model_family(hf).latent else TransformerConfig
    try:
        return kind(**fields)
    except ValueError as error:
        raise UserError(
            f"Megatron-Core refuses the model of {config.model.path} with the settings of parallel "
            f"and fp8: {error}",
            key="model.path",
            cause=Cause.UNSUPPORTED,
        ) from error


def _shared_fields(hf: dict, dtype: torch.dtype, transformer_engine: bool) -> dict[str, Any]:
    """Return the fields that need torch, and those that all architectures have alike."""
    family = model_family(hf)
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "init_method_std": hf.get("initializer_range", 0.02),
        "normalization": "RMSNorm",
        "activation_func": quick_gelu if family.open_swiglu else torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": family.biases,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        "use_cpu_initialization": not platform.has_gpu(),
        "variable_seq_lengths": True,
        "calculate_per_token_loss": True,
        "batch_p2p_comm": False,
        # Off: nothing is dropped out, softmax and norms are Transformer Engine's, and
        # `models.rotary` replaces what the last one would fuse.
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }


def _parallel_fields(parallel: ParallelConfig, has_experts: bool) -> dict[str, Any]:
    fields = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "expert_model_parallel_size": parallel.expert,
        "context_parallel_size": parallel.context,
        # A packed batch then has a multiple of parallel.tensor tokens.
        "sequence_parallel": parallel.splits_sequences(has_experts),
    }
    return fields | ({"expert_tensor_parallel_size": parallel.expert_tensor} if has_experts else {})


def _pipeline_fields(parallel: ParallelConfig, num_layers: int, num_mtp: int) -> dict[str, Any]:
    """Return Megatron's fields of the pipeline layout. Raises UserError for one that it cannot
    run."""
    ranks, virtual, layout = parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layout
    layout = layout or uneven_layout(num_layers, ranks, virtual, num_mtp=num_mtp)
    stages = pipeline_stages(num_layers, ranks, virtual, num_mtp=num_mtp, layout=layout)
    if ranks == 1:
        if len(stages[0]) > 1:
            raise UserError(
                f"parallel.virtual_pipeline={len(stages[0])} needs parallel.pipeline > 1: one rank "
                "alone cannot interleave",
                key="parallel.virtual_pipeline",
                cause=Cause.CONFLICT,
            )
        return {}
    if any(stage.mtp for stage in stages[0][1:]):
        raise UserError(
            f"parallel.pipeline_layout={layout!r}: MTP layers (m) cannot be on a later chunk of "
            "the first pipeline rank, whose two embeddings nothing would keep equal; use another",
            key="parallel.pipeline_layout",
            cause=Cause.UNSUPPORTED,
        )
    interleaved = len(stages[0]) > 1
    return {
        "pipeline_model_parallel_layout": layout,
        "virtual_pipeline_model_parallel_size": len(stages[0]) if interleaved else None,
        # With two pipeline ranks both neighbors are the same rank, and shapes sent to both at once
        # arrive swapped (p2p_communication.py:221, Megatron-Core 0.16.1). Overlapped, each
        # direction is a message of its own.
        "overlap_p2p_comm": interleaved,
    }


def _recompute_fields(parallel: ParallelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's recompute fields; `fields` are those of the model."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    lacking = set() if "kv_lora_rank" in fields else {"mla_up_proj"}
    if not fields.get("num_moe_experts"):
        lacking |= {"moe", "moe_act", "shared_experts"}
    modules = parallel.recompute_modules
    for module in modules:
        if module not in RECOMPUTABLE:
            raise UserError(
                f"parallel.recompute_modules: {module!r} is none of {', '.join(RECOMPUTABLE)}",
                key="parallel.recompute_modules",
                cause=Cause.UNKNOWN,
            )
        if module in lacking:
            raise UserError(
                f"parallel.recompute_modules: this model has no {module!r}; leave it",
                key="parallel.recompute_modules",
                cause=Cause.CONFLICT,
            )
    if "moe" in modules and "shared_experts" in modules:
        raise UserError(
            "parallel.recompute_modules: 'moe' includes 'shared_experts'; name one",
            key="parallel.recompute_modules",
            cause=Cause.DUPLICATE,
        )
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
