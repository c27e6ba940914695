"""Names the implementation of each part of a training step, read from the objects in use."""

from __future__ import annotations

import os
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from megatron_r1.models import platform
from megatron_r1.models.attention_choice import ATTENTION_LIBRARIES
from megatron_r1.models.device_connections import CONNECTIONS_VARIABLE
from megatron_r1.models.loaded_libraries import loaded_libraries
from megatron_r1.models.megatron_config import FUSION_FIELDS
from megatron_r1.models.weights.adapter_table import num_adapter_parameters

if TYPE_CHECKING:
    from megatron_r1.trainer.trainer import Trainer

MODULE_ROLES = {
    "attention": r"core_attention",
    "norm": r"\w*norm",
    "linear layers": r"linear_\w+|eh_proj",
    "experts": r"experts",
}
"""Part → the names of its modules, as a regular expression."""
PACKAGE_LABELS = {
    "megatron_r1": "ours",
    "megatron": "Megatron-Core",
    "transformer_engine": "Transformer Engine",
    "apex": "Apex",
}


def describe_implementations(trainer: Trainer) -> dict[str, str]:
    """Return the implementation of each part on this rank."""
    classes: dict[str, set[str]] = {}
    for chunk in trainer.model_chunks:
        for name, module in chunk.named_modules():
            role = _module_role(name)
            if role and not isinstance(module, IdentityOp):
                classes.setdefault(role, set()).add(_class_label(type(module)))
            if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
                classes.setdefault("dispatcher", set()).add(_class_label(type(dispatcher)))
    parts = {role: ", ".join(sorted(kinds)) for role, kinds in classes.items()}
    config = trainer.transformer_config
    if "attention" in parts and trainer.attention is not None:
        parts["attention"] += f": {trainer.attention}"
        for library in loaded_libraries(*ATTENTION_LIBRARIES):
            parts[library.name] = f"{library.version} ({library.file})"
    if config.overlap_moe_expert_parallel_comm:
        parts["dispatcher"] += ", behind another micro-batch's computation"
    fusions = [name for name, field in FUSION_FIELDS.items() if getattr(config, field)]
    parts["fusions"] = ", ".join(fusions) or "none"
    if (lora := trainer.config.model.lora) is not None:
        count = num_adapter_parameters(trainer.hf_config, lora)
        parts["adapters"] = f"rank {lora.rank}, {count / 1e6:,.2f}M parameters, all that is trained"
    parts["optimizer"] = _optimizer_description(trainer.optimizer)
    parts["gradient reduction"] = _reduction_description(trainer.ddp_chunks[0].ddp_config)
    if platform.has_gpu():
        number = os.environ.get(CONNECTIONS_VARIABLE, "CUDA's own")
        parts["connections to the GPU"] = f"{number} ({CONNECTIONS_VARIABLE})"
    parts["loss head"] = "r1_kernels, in " + (
        _triton_description() if platform.has_gpu() else "PyTorch"
    )
    return parts


def _module_role(name: str) -> str | None:
    last_name = name.rpartition(".")[2]
    return next(
        (role for role, names in MODULE_ROLES.items() if re.fullmatch(names, last_name)), None
    )


def _class_label(kind: type) -> str:
    module = kind.__module__
    package = "transformer_engine" if ".transformer_engine" in module else module.split(".")[0]
    return f"{kind.__name__} ({PACKAGE_LABELS.get(package, package)})"


def _optimizer_description(optimizer: Any) -> str:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    kinds = {_class_label(type(part.optimizer)) for part in parts}
    return f"{', '.join(sorted(kinds))} in {type(parts[0]).__name__}"


def _reduction_description(settings: Any) -> str:
    dtype = "float32" if settings.grad_reduce_in_fp32 else "the parameters' dtype"
    is_overlapped = {
        "reduction": settings.overlap_grad_reduce,
        "gather of parameters": settings.overlap_param_gather,
    }
    overlapped_names = " and ".join(name for name, is_on in is_overlapped.items() if is_on)
    return (
        f"{platform.distributed_backend()} in {dtype}, {overlapped_names or 'nothing'} overlapped"
    )


def _triton_description() -> str:
    return f"Triton {metadata.version('triton')} (torch {torch.__version__})"
