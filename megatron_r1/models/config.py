"""From a Hugging Face configuration and parallel sizes to Megatron's TransformerConfig."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_r1 import platform
from megatron_r1.models.hf_config import architecture, need

_RECOMPUTE = {
    None: {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def transformer_config(
    hf: dict,
    *,
    params_dtype: torch.dtype,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    context_parallel: int = 1,
    sequence_parallel: bool | None = None,
    expert_bias_update_rate: float = 0.0,
    recompute: str | None = None,
    **overrides,
) -> TransformerConfig:
    """The Megatron configuration of the model `hf` describes (with latent attention, an MLA one).

    sequence_parallel defaults to whether tensor_parallel > 1 for models with experts (Megatron
    demands it there; a packed batch must then have a multiple of tensor_parallel tokens) and to
    False for others. expert_bias_update_rate: step of the router's load-balancing bias per
    optimizer step; 0 keeps it fixed. recompute: None, "selective" (attention only) or "full" (every
    layer). overrides: any further field of Megatron's configuration, last word.

    Raises ValueError for a configuration this stack would compute wrongly, for sizes that do not
    divide, and for an unknown override.
    """
    model = import_module(f"megatron_r1.models.{architecture(hf)}")
    need(hf, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    need(hf, "vocab_size", "rms_norm_eps")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported, only 'silu' is")
    if recompute not in _RECOMPUTE:
        raise ValueError(f"recompute={recompute!r} must be one of None, 'selective', 'full'")
    transformer_engine = platform.uses_transformer_engine()
    sizes = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
        "expert_tensor_parallel": expert_tensor_parallel,
        "context_parallel": context_parallel,
    }
    fields = model.config_fields(hf)
    has_experts = bool(fields.get("num_moe_experts"))
    _check_sizes(hf, model, sizes, overrides, has_experts, transformer_engine)
    if sequence_parallel is None:
        sequence_parallel = tensor_parallel > 1 and has_experts
    if has_experts and tensor_parallel > 1 and not sequence_parallel:
        raise ValueError(
            f"sequence_parallel=False with tensor_parallel={tensor_parallel} is not possible for a "
            "model with experts: Megatron splits their tokens along the sequence"
        )
    fields |= _shared_fields(hf, params_dtype, transformer_engine) | _RECOMPUTE[recompute]
    if has_experts:
        fields |= {
            "moe_router_bias_update_rate": expert_bias_update_rate,
            "moe_grouped_gemm": transformer_engine,
            "expert_tensor_parallel_size": expert_tensor_parallel,
        }
    fields |= {
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "expert_model_parallel_size": expert_parallel,
        "context_parallel_size": context_parallel,
        "sequence_parallel": sequence_parallel,
    }
    kind = MLATransformerConfig if model.LATENT_ATTENTION else TransformerConfig
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    return kind(**{**fields, **overrides})


def _shared_fields(hf: dict, params_dtype: torch.dtype, transformer_engine: bool) -> dict:
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "init_method_std": hf.get("initializer_range", 0.02),
        "normalization": "RMSNorm",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        "use_cpu_initialization": not platform.has_gpu(),
        # Megatron asks this of dense models too once lengths vary.
        "moe_token_dispatcher_type": "alltoall",
        "variable_seq_lengths": True,
        "calculate_per_token_loss": True,
        "batch_p2p_comm": False,
        # The fusions are CUDA kernels; recipes for GPUs turn on what they have measured.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }


def _check_sizes(hf, model, sizes, overrides, has_experts, transformer_engine) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"parallel.{name}={size!r} must be a positive integer")
        if name.startswith("expert") and size > 1 and not has_experts:
            raise ValueError(f"parallel.{name}={size} needs a model with experts")
    if (
        min(sizes["expert_parallel"], sizes["expert_tensor_parallel"]) > 1
        and not platform.has_gpu()
    ):
        raise ValueError(
            f"parallel.expert_tensor_parallel={sizes['expert_tensor_parallel']} together with "
            f"expert_parallel={sizes['expert_parallel']} needs gathers of uneven length, which "
            "gloo lacks; set expert_tensor_parallel to 1 on a CPU"
        )
    rules = model.divisions(hf, transformer_engine)
    uneven = (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
    )
    if not any(overrides.get(name) for name in uneven):
        rules.append(("num_hidden_layers", hf["num_hidden_layers"], "pipeline_parallel"))
    for field, size, setting in rules:
        if size % sizes[setting]:
            raise ValueError(
                f"parallel.{setting}={sizes[setting]} does not divide {field}={size}; "
                f"choose a divisor of {size}"
            )
    if sizes["context_parallel"] > 1 and not transformer_engine:
        raise ValueError(
            f"parallel.context_parallel={sizes['context_parallel']} needs Transformer Engine's "
            "attention; set it to 1 on a CPU"
        )
