"""A model as transformers loads it, for comparisons in a process that does not prepare Megatron."""

from pathlib import Path
from typing import Any

import torch

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig


def load_with_transformers(
    folder: str | Path, hf_config: HFConfig, dtype: torch.dtype, **options: Any
) -> Any:
    """Return what transformers loads from `folder`, whose `config.json` is `hf_config`.

    By architecture, not model_type: Kimi-K2 has a type of its own for DeepSeek-V3's class, and
    transformers chooses both the class and how stored experts become its own by the type (an
    unknown one leaves them random). Experts one by one: PyTorch's grouped product takes no matrix
    whose rows are not a multiple of 16 bytes.

    Args:
        folder: the model's folder, in Hugging Face format.
        hf_config: the model's `config.json`.
        dtype: the dtype of the loaded weights.
        **options: further options of from_pretrained.

    Raises:
        UserError: for a `config.json` that transformers refuses.
    """
    kind, config = _class_and_config(folder, hf_config)
    options = {"experts_implementation": "eager"} | options
    return kind.from_pretrained(folder, config=config, dtype=dtype, **options)


def build_without_weights(folder: str | Path, hf_config: HFConfig) -> Any:
    """Return the model that `load_with_transformers` loads, fp32 in eval mode, with its weights on
    the meta device: they take no memory. Buffers that no file has, as rotary frequencies, have
    their values.

    Args:
        folder: the folder of the model's `config.json`.
        hf_config: that file.

    Raises:
        UserError: for a `config.json` that transformers refuses.
    """
    kind, config = _class_and_config(folder, hf_config)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = kind(config)
    stored_names = model.state_dict().keys()
    rotary = {
        name.rpartition(".")[0] for name, _ in model.named_buffers() if name not in stored_names
    }
    for name in rotary:
        module = model.get_submodule(name)
        model.set_submodule(name, type(module)(module.config))
    return model.eval()


def _class_and_config(folder: str | Path, hf_config: HFConfig) -> tuple[Any, Any]:
    """Return transformers' class of a model, and its configuration of the model's type.

    Raises:
        UserError: for a `config.json` that transformers refuses."""
    import transformers

    kind = getattr(transformers, hf_config["architectures"][0])
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
    return kind, config
