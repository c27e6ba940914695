"""Loads a model by transformers, for comparisons; in a process that does not prepare Megatron."""

from pathlib import Path
from typing import Any

import torch

from megatron_r1.base.errors import Cause, UserError


def load_by_transformers(folder: str | Path, hf: dict, dtype: torch.dtype, **options: Any) -> Any:
    """Return what transformers loads from `folder`, whose `config.json` is `hf`.

    By architecture, not model_type: Kimi-K2 has a type of its own for DeepSeek-V3's class, and
    transformers chooses both the class and how stored experts become its own by the type (an
    unknown one leaves them random). Experts one by one: PyTorch's grouped product takes no matrix
    whose rows are not a multiple of 16 bytes. options: of from_pretrained. Raises UserError for a
    `config.json` that transformers refuses."""
    import transformers

    kind = getattr(transformers, hf["architectures"][0])
    try:
        config = kind.config_class.from_pretrained(folder)
    except Exception as error:  # every class has checks of its own, of many kinds
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(
            f"{Path(folder) / 'config.json'}: transformers refuses it: {reason}; correct the key",
            key="config.json",
            cause=Cause.MALFORMED,
        ) from error
    config.model_type = kind.config_class.model_type
    options = {"experts_implementation": "eager"} | options
    return kind.from_pretrained(folder, config=config, dtype=dtype, **options)
