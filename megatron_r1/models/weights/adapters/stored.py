"""Export of the adapters alone, in PEFT's format."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_r1.base.files import atomic_write
from megatron_r1.config.model import LoraConfig
from megatron_r1.models.weights.adapters.attach import adapter_pieces
from megatron_r1.models.weights.adapters.table import adapter_shapes, adapter_table, target_modules
from megatron_r1.models.weights.stored.safetensors_file import plan_file
from megatron_r1.models.weights.writing import new_folder, write_pieces

PREFIX = "base_model.model."
"""The beginning of every name in PEFT's files."""


def save_adapter(
    chunks: Sequence, hf: dict, lora: LoraConfig, base: str, out: Path, dtype: torch.dtype
) -> None:
    """Write `out`, which peft.PeftModel.from_pretrained loads; call on every rank.

    base: the folder of the model that the adapters belong to. The folder appears complete or not at
    all (an existing one is replaced). Raises UserError on every rank when something cannot be
    written."""
    rules = adapter_table(hf, lora)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": target_modules(rules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }

    def begin(folder: Path) -> None:
        text = json.dumps(settings, indent=2) + "\n"
        atomic_write(folder / "adapter_config.json", text)

    plan = plan_file({PREFIX + name: (s, dtype) for name, s in adapter_shapes(rules).items()})
    held = (
        (factor, [replace(piece, hf_name=PREFIX + piece.hf_name) for piece in pieces], owner)
        for factor, pieces, owner in adapter_pieces(chunks)
    )
    with new_folder(out, begin) as folder:
        write_pieces(held, {folder / "adapter_model.safetensors": plan}, {}, durable=True)
