"""A model as transformers loads it, for comparisons; in a process that does not prepare Megatron.

`write_dequantized` makes a quantized model folder into one that transformers and vLLM can load on a
CPU, with weights in fp32. Their own dequantization there takes an optional package, wants a GPU, or
assumes evenly cut blocks and so refuses or misreads matrices with a partial last block, such as
DeepSeek-V3's kv_a_proj of 576 rows (integrations/finegrained_fp8.py, transformers 5.19)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.hf_writer import copy_model_files
from megatron_r1.models.weights.formats.published_layout import published_tensors


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


def write_dequantized(weights: HFWeights, folder: Path) -> None:
    """Write the checked `weights` with their tokenizer and configuration into `folder`. All of them
    are in memory at once."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_model_files(weights.path, folder)
    config = json.loads((weights.path / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        name: weights.read_whole(name).float().contiguous()
        for name in published_tensors(weights.hf_config)
        if weights.has(name)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
