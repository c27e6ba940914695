"""Loads a model by transformers, for comparisons; in a process that does not prepare Megatron."""

from pathlib import Path
from typing import Any

import torch


def load_by_transformers(folder: str | Path, hf: dict, dtype: torch.dtype, **options: Any) -> Any:
    """Return what transformers loads from `folder`, whose `config.json` is `hf`.

    By architecture, not model_type: Kimi-K2 has a type of its own for DeepSeek-V3's class, and
    transformers chooses both the class and how stored experts become its own by the type (an
    unknown one leaves them random). options: of from_pretrained."""
    import transformers

    kind = getattr(transformers, hf["architectures"][0])
    config = kind.config_class.from_pretrained(folder)
    config.model_type = kind.config_class.model_type
    return kind.from_pretrained(folder, config=config, dtype=dtype, **options)
