"""Translates a Hugging Face configuration and parallel sizes into Megatron's TransformerConfig."""

import dataclasses
from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_r1 import platform
from megatron_r1.errors import UserError
from megatron_r1.models.hf_config import check_supported, model_family
from megatron_r1.models.pipeline_stages import pipeline_stages

RECOMPUTE_MODULES = [
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "shared_experts",
]


def transformer_config(
    hf: dict,
    *,
    params_dtype: torch.dtype,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    context_parallel: int = 1,
    virtual_pipeline: int = 1,
    pipeline_layout: str | None = None,
    sequence_parallel: bool | None = None,
    with_mtp: bool = True,
    expert_bias_update_rate: float = 0.0,
    recompute: str = "none",
    recompute_modules: Sequence[str] = ("core_attn",),
    **overrides,
) -> TransformerConfig:
    """Return Megatron's configuration of the model `hf` describes (MLATransformerConfig for latent
    attention).

    virtual_pipeline: model chunks per pipeline rank, for the interleaved schedule. pipeline_layout:
    the layers of each chunk (`models.pipeline_stages`); None: layers spread evenly.
    sequence_parallel: None means True for models with experts where tensor_parallel > 1 (Megatron
    requires it there; a packed batch must then have a multiple of tensor_parallel tokens), else
    False. with_mtp: whether to build the multi-token-prediction layers. overrides: fields of
    Megatron's configuration that replace these. The rest: as in `config.ParallelConfig` and
    `config.ModelConfig`.

    Raises UserError for a configuration this stack would compute wrongly, for sizes that do not
    divide, and for an unknown override."""
    model = model_family(hf)
    check_supported(hf)
    transformer_engine = platform.uses_transformer_engine()
    sizes = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
        "expert_tensor_parallel": expert_tensor_parallel,
        "context_parallel": context_parallel,
    }
    fields = model.config_fields(hf)
    if not with_mtp:
        fields["mtp_num_layers"] = None
    has_experts = bool(fields.get("num_moe_experts"))
    _check_sizes(hf, model, sizes, has_experts, transformer_engine)
    fields |= _pipeline_fields(fields, hf, pipeline_parallel, virtual_pipeline, pipeline_layout)
    fields |= _shared_fields(hf, params_dtype, transformer_engine)
    fields |= _recompute_fields(recompute, recompute_modules, fields)
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
        "sequence_parallel": _sequence_parallel(sequence_parallel, tensor_parallel, has_experts),
    }
    kind = MLATransformerConfig if model.LATENT_ATTENTION else TransformerConfig
    unknown = overrides.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise UserError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    try:
        return kind(**{**fields, **overrides})
    except ValueError as error:
        raise UserError(f"Megatron-Core refuses this configuration: {error}") from error


def _sequence_parallel(setting: bool | None, tensor_parallel: int, has_experts: bool) -> bool:
    if setting is None:
        return tensor_parallel > 1 and has_experts
    if has_experts and tensor_parallel > 1 and not setting:
        raise UserError(
            f"sequence_parallel=False with tensor_parallel={tensor_parallel} is not possible for a "
            "model with experts: Megatron splits their tokens along the sequence"
        )
    return setting


def _recompute_fields(recompute: str, modules: Sequence[str], fields: dict) -> dict:
    """Return Megatron's recompute fields; `fields` are those of the model."""
    if recompute == "none":
        return {}
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if recompute != "selective":
        raise UserError(f"parallel.recompute={recompute!r} must be none, selective or full")
    lacking = set() if "kv_lora_rank" in fields else {"mla_up_proj"}
    if not fields.get("num_moe_experts"):
        lacking |= {"moe", "moe_act", "shared_experts"}
    for module in modules:
        if module not in RECOMPUTE_MODULES:
            raise UserError(
                f"parallel.recompute_modules: {module!r} is none of {', '.join(RECOMPUTE_MODULES)}"
            )
        if module in lacking:
            raise UserError(f"parallel.recompute_modules: this model has no {module!r}; leave it")
    if "moe" in modules and "shared_experts" in modules:
        raise UserError("parallel.recompute_modules: 'moe' includes 'shared_experts'; name one")
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def _pipeline_fields(
    fields: dict, hf: dict, pipeline: int, virtual: int, layout: str | None
) -> dict:
    num_layers, num_mtp = hf["num_hidden_layers"], fields.get("mtp_num_layers") or 0
    stages = pipeline_stages(num_layers, pipeline, virtual, num_mtp=num_mtp, layout=layout)
    if pipeline == 1:
        if len(stages[0]) > 1:
            raise UserError(
                f"parallel.virtual_pipeline={len(stages[0])} needs parallel.pipeline > 1: one rank "
                "alone cannot interleave"
            )
        return {}
    if any(stage.mtp for stage in stages[0][1:]):
        raise UserError(
            f"parallel.pipeline_layout={layout!r}: MTP layers (m) cannot be on a later chunk of "
            "the first pipeline rank, whose two embeddings nothing would keep equal; use another"
        )
    interleaved = len(stages[0]) > 1
    return {
        "pipeline_model_parallel_layout": layout,
        "virtual_pipeline_model_parallel_size": len(stages[0]) if interleaved else None,
        # With two pipeline ranks both neighbours are the same rank, and shapes sent to both at once
        # arrive swapped (p2p_communication.py:221, Megatron-Core 0.16.1). Overlapped, each
        # direction is a message of its own.
        "overlap_p2p_comm": interleaved,
    }


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
        # Megatron requires this of dense models too when lengths vary.
        "moe_token_dispatcher_type": "alltoall",
        "variable_seq_lengths": True,
        "calculate_per_token_loss": True,
        "batch_p2p_comm": False,
        # Off: these fusions are CUDA kernels, of Apex and Transformer Engine or Megatron's own,
        # and none has been measured against our results on a GPU. No recipe key turns them on.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }


def _check_sizes(hf, model, sizes, has_experts, transformer_engine) -> None:
    for name, size in sizes.items():
        key = f"parallel.{name.removesuffix('_parallel')}"
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{key}={size!r} must be a positive integer")
        if name.startswith("expert") and size > 1 and not has_experts:
            raise UserError(f"{key}={size} needs a model with experts")
    rules = model.divisions(hf, transformer_engine)
    for field, size, setting in rules:
        if size % sizes[setting]:
            raise UserError(
                f"parallel.{setting.removesuffix('_parallel')}={sizes[setting]} does not divide "
                f"{field}={size}; choose a divisor of {size}"
            )
