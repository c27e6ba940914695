"""Translates a Hugging Face configuration and a recipe into Megatron's TransformerConfig.

`_acceleration_fields` selects the implementations of attention, fused operations and the dispatch
of tokens to experts: `model.attention_backend`, `model.fusions` and `parallel.dispatcher` as
Megatron's fields. What this machine cannot do is an error with the setting's name; nothing is
replaced silently.

FP8: Megatron-Core 0.19.2 wraps every decoder and MTP layer in Transformer Engine's autocast when
`TransformerConfig.fp8` is set (transformer_block.py:650, multi_token_prediction.py:1181).
Embedding, head, router and norms are not Transformer Engine linear layers;
`fp8_dot_product_attention=False` excludes attention."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.activations import quick_gelu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config, FP8Config, ParallelConfig
from megatron_r1.config.model import Fusion
from megatron_r1.models import platform
from megatron_r1.models.attention_choice import backend_variables
from megatron_r1.models.exchange_overlap_checks import check_exchange_overlap
from megatron_r1.models.fp8_checks import transformer_engine_fp8_fields
from megatron_r1.models.hf_config import HFConfig, model_family
from megatron_r1.models.parallel_checks import check_divisions
from megatron_r1.models.pipeline_stages import pipeline_stages, uneven_layout
from megatron_r1.models.support_checks import model_fields

FUSION_FIELDS = {
    "gradient_accumulation": "gradient_accumulation_fusion",
    "activation": "bias_activation_fusion",
    "permute": "moe_permute_fusion",
}
"""Fusion → the field of Megatron's TransformerConfig."""
ON_GPUS: list[Fusion] = ["gradient_accumulation", "permute"]
"""Fusions of Transformer Engine itself, the default on a GPU."""
FLASH_ATTENTION = ("flash_attn", "flash_attn_3", "flash_attn_interface")
"""Modules that Transformer Engine uses for flash attention, if they are installed."""


def _acceleration_fields(config: Config, has_experts: bool) -> dict[str, Any]:
    """Return Megatron's fields for `model.attention_backend`, `model.fusions` and
    `parallel.dispatcher`.

    Raises:
        UserError: this machine cannot do what a setting names.
    """
    backend = config.model.attention_backend
    _check_attention(backend)
    fusions = config.model.fusions
    if fusions is None:
        fusions = ON_GPUS if platform.has_gpu() else []
    for fusion in fusions:
        _check_fusion(fusion)
    enabled_fields = {
        FUSION_FIELDS[fusion] for fusion in fusions if has_experts or fusion != "permute"
    }
    fields: dict[str, Any] = {field: field in enabled_fields for field in FUSION_FIELDS.values()}
    return fields | {
        "attention_backend": AttnBackend[backend],
        # Megatron requires this of dense models too when lengths vary.
        "moe_token_dispatcher_type": "alltoall",
        **(_dispatcher_fields(config) if has_experts else {}),
    }


def _check_attention(backend: str) -> None:
    if not platform.has_gpu():
        if backend != "auto":
            raise UserError(
                f"model.attention_backend: {backend} is for GPUs, and a CPU has one attention: use "
                "auto",
                key="model.attention_backend",
                cause=Cause.UNSUPPORTED,
            )
        return
    if backend == "flash" and not any(map(find_spec, FLASH_ATTENTION)):
        raise UserError(
            "model.attention_backend: flash needs the package flash-attn, which is not installed; "
            "install it, or use fused (cuDNN) or auto",
            key="model.attention_backend",
            cause=Cause.NOT_INSTALLED,
        )
    for variable, expected_value in backend_variables(backend).items():
        if (current_value := os.environ.get(variable, expected_value)) != expected_value:
            raise UserError(
                f"model.attention_backend: {backend} sets {variable}={expected_value}, and the "
                f"environment has {variable}={current_value}; unset it and use the setting",
                key="model.attention_backend",
                cause=Cause.CONFLICT,
            )


def _check_fusion(fusion: str) -> None:
    if not platform.has_gpu():
        raise UserError(
            f"model.fusions: {fusion} is a CUDA kernel, and there is no GPU; use [] or leave it "
            "out",
            key="model.fusions",
            cause=Cause.UNSUPPORTED,
        )
    if fusion == "permute":
        from megatron.core.transformer.moe import moe_utils

        if getattr(moe_utils, "fused_permute", None) is None:
            raise UserError(
                "model.fusions: permute needs Transformer Engine 2.1 or newer; leave it out",
                key="model.fusions",
                cause=Cause.NOT_INSTALLED,
            )


def _dispatcher_fields(config: Config) -> dict[str, Any]:
    if config.parallel.dispatcher == "alltoall":
        return {}
    from megatron.core.transformer.moe import fused_a2a

    if not (platform.has_gpu() and fused_a2a.HAVE_DEEP_EP):
        raise UserError(
            "parallel.dispatcher: flex needs GPUs and the package deep_ep (DeepEP), which does not "
            "import here; install it, or use alltoall",
            key="parallel.dispatcher",
            cause=Cause.NOT_INSTALLED,
        )
    if config.parallel.tensor * config.parallel.expert == 1:
        raise UserError(
            "parallel.dispatcher: flex sends tokens between ranks, and parallel.tensor x "
            "parallel.expert is 1; use alltoall",
            key="parallel.dispatcher",
            cause=Cause.CONFLICT,
        )
    return {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}


def _fp8_fields(fp8: FP8Config) -> dict[str, Any]:
    """Return the TransformerConfig fields for `fp8`; UserError where this GPU cannot run it."""
    if fp8.recipe == "none" or not platform.has_gpu():
        return {}
    return transformer_engine_fp8_fields(fp8)


RECOMPUTABLE = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def transformer_config(hf_config: HFConfig, config: Config) -> TransformerConfig:
    """Return Megatron's configuration of the model `hf_config` (MLATransformerConfig for latent
    attention) by the sections model, parallel and fp8 of a recipe.

    Args:
        hf_config: the model's `config.json`.
        config: the recipe.

    Raises:
        UserError: for a configuration this stack would compute wrongly, for sizes that do not
            divide, and for FP8, fusions and kernels that this machine cannot run.
    """
    fields, parallel = model_fields(hf_config), config.parallel
    if config.model.mtp == "none":
        fields["mtp_num_layers"] = None
    has_experts = bool(fields.get("num_moe_experts"))
    transformer_engine = platform.uses_transformer_engine()
    check_divisions(hf_config, parallel, transformer_engine)
    check_exchange_overlap(config, hf_config)
    fields |= _shared_fields(hf_config, getattr(torch, config.model.dtype), transformer_engine)
    fields |= _parallel_fields(parallel, has_experts)
    fields |= _pipeline_fields(
        parallel, hf_config["num_hidden_layers"], fields.get("mtp_num_layers") or 0
    )
    fields |= _recompute_fields(parallel, fields)
    fields |= _fp8_fields(config.fp8)
    fields |= _acceleration_fields(config, has_experts)
    if fields.get("softmax_type") and config.model.attention_backend == "flash":
        raise UserError(
            "model.attention_backend: flash has no learned softmax offsets, which "
            f"{hf_config['architectures'][0]} needs; use unfused, or auto",
            key="model.attention_backend",
            cause=Cause.UNSUPPORTED,
        )
    if has_experts:
        fields["moe_router_bias_update_rate"] = config.model.expert_bias_update_rate
        fields["moe_grouped_gemm"] = transformer_engine
    kind = MLATransformerConfig if model_family(hf_config).latent_attention else TransformerConfig
    try:
        return kind(**fields)
    except ValueError as error:
        raise UserError(
            f"Megatron-Core refuses the model of {config.model.path} with the settings of parallel "
            f"and fp8: {error}",
            key="model.path",
            cause=Cause.UNSUPPORTED,
        ) from error


def _shared_fields(
    hf_config: HFConfig, dtype: torch.dtype, transformer_engine: bool
) -> dict[str, Any]:
    """Return the fields that need torch, and those that all architectures have alike."""
    family = model_family(hf_config)
    return {
        "num_layers": hf_config["num_hidden_layers"],
        "hidden_size": hf_config["hidden_size"],
        "num_attention_heads": hf_config["num_attention_heads"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "layernorm_epsilon": hf_config["rms_norm_eps"],
        "init_method_std": hf_config.get("initializer_range", 0.02),
        "normalization": "RMSNorm",
        "activation_func": quick_gelu if family.clamped_swiglu else torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": family.linear_biases,
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
        # `models.patches` replaces what the last one would fuse.
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
        "overlap_moe_expert_parallel_comm": parallel.overlap_expert_exchange,
    }
    return fields | ({"expert_tensor_parallel_size": parallel.expert_tensor} if has_experts else {})


def _pipeline_fields(parallel: ParallelConfig, num_layers: int, num_mtp: int) -> dict[str, Any]:
    """Return Megatron's fields of the pipeline layout.

    Raises:
        UserError: Megatron cannot run the layout.
    """
    ranks, chunks, layout = parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layout
    layout = layout or uneven_layout(num_layers, ranks, chunks, num_mtp=num_mtp)
    stages = pipeline_stages(num_layers, ranks, chunks, num_mtp=num_mtp, layout=layout)
    if ranks == 1:
        if len(stages[0]) > 1:
            raise UserError(
                f"parallel.virtual_pipeline={len(stages[0])} needs parallel.pipeline > 1: one rank "
                "alone cannot interleave",
                key="parallel.virtual_pipeline",
                cause=Cause.CONFLICT,
            )
        return {}
    if any(chunk.mtp for chunk in stages[0][1:]):
        raise UserError(
            f"parallel.pipeline_layout={layout!r}: MTP layers (m) cannot be on a later chunk of "
            "the first pipeline rank, whose two embeddings nothing would keep equal; use another",
            key="parallel.pipeline_layout",
            cause=Cause.UNSUPPORTED,
        )
    is_interleaved = len(stages[0]) > 1
    return {
        "pipeline_model_parallel_layout": layout,
        "virtual_pipeline_model_parallel_size": len(stages[0]) if is_interleaved else None,
        # Each direction is a message of its own, on its way while a chunk computes. Shapes, which
        # Megatron would swap between two ranks (p2p_communication.py:242, Megatron-Core 0.19.2),
        # are not sent: `trainer.stage_communication` knows them.
        "overlap_p2p_comm": is_interleaved,
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
    lacking_modules = set() if "kv_lora_rank" in fields else {"mla_up_proj"}
    if not fields.get("num_moe_experts"):
        lacking_modules |= {"moe", "moe_act", "shared_experts"}
    modules = parallel.recompute_modules
    for module in modules:
        if module not in RECOMPUTABLE:
            raise UserError(
                f"parallel.recompute_modules: {module!r} is not one of {', '.join(RECOMPUTABLE)}",
                key="parallel.recompute_modules",
                cause=Cause.UNKNOWN,
            )
        if module in lacking_modules:
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
