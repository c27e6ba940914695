"""Selects the implementations of attention, fused operations and the dispatch of tokens to experts:
`model.attention_backend`, `model.fusions` and `parallel.dispatcher` as Megatron's fields.

What this machine cannot do is an error with the setting's name; nothing is replaced silently."""

import os
from importlib.util import find_spec
from typing import Any

from megatron.core.transformer.enums import AttnBackend

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.model import Fusion
from megatron_r1.models import platform

FIELDS = {
    "gradient_accumulation": "gradient_accumulation_fusion",
    "activation": "bias_activation_fusion",
    "permute": "moe_permute_fusion",
}
"""Fusion → the field of Megatron's TransformerConfig."""
ON_GPUS: list[Fusion] = ["gradient_accumulation", "permute"]
"""Fusions of Transformer Engine itself, the default on a GPU."""
FLASH_ATTENTION = ("flash_attn", "flash_attn_3", "flash_attn_interface")
"""Modules that Transformer Engine uses for flash attention, if they are installed."""
ENVIRONMENT = {
    "flash": "NVTE_FLASH_ATTN",
    "fused": "NVTE_FUSED_ATTN",
    "unfused": "NVTE_UNFUSED_ATTN",
}
"""Variables by which Megatron selects a backend of Transformer Engine's attention."""


def acceleration_fields(config: Config, has_experts: bool) -> dict[str, Any]:
    """Return Megatron's fields for `model.attention_backend`, `model.fusions` and
    `parallel.dispatcher`. Raises UserError where this machine cannot do what a setting names."""
    backend = config.model.attention_backend
    _check_attention(backend)
    fusions = config.model.fusions
    if fusions is None:
        fusions = ON_GPUS if platform.has_gpu() else []
    for fusion in fusions:
        _check_fusion(fusion)
    on = {FIELDS[fusion] for fusion in fusions if has_experts or fusion != "permute"}
    fields: dict[str, Any] = {field: field in on for field in FIELDS.values()}
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
    for name, variable in ENVIRONMENT.items():
        wanted = str(int(backend in ("auto", name)))
        if (found := os.environ.get(variable, wanted)) != wanted:
            raise UserError(
                f"model.attention_backend: {backend} sets {variable}={wanted}, and the environment "
                f"has {variable}={found}; unset it and use the setting",
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
