"""Write a Hugging Face folder's files: configuration, tokenizer, index, the split of weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from megatron_r1.base.files import atomic_write, fsync, make_folder
from megatron_r1.base.files.untrusted_files import read_json, require_inside
from megatron_r1.base.files.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_r1.data.end_tokens import end_tokens
from megatron_r1.data.tokenizer import END_TOKEN_FILES
from megatron_r1.models.hf_config import has_score_head, score_model_config
from megatron_r1.models.hf_config_file import implied_settings
from megatron_r1.models.weights.formats import published_layout
from megatron_r1.models.weights.layout import Shape

Tensors = Mapping[str, tuple[Shape, torch.dtype]]

# Small files next to the weights: configuration, tokenizer, chat templates, the license. The
# folder's Python files are also copied: other loaders may want them, here nothing runs them.
_COPIED_PATTERNS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.vocab",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
# Files that describe the weights of `source`, by whichever tool wrote them.
_WEIGHT_METADATA_PATTERNS = (
    "config.json",
    "adapter_config.json",
    "*.index.json",
    "*quant*_config.json",
)


def split_into_files(tensors: Tensors, max_bytes: int) -> dict[str, Tensors]:
    """Return file name -> its tensors, at most max_bytes, except for larger single tensors.

    The scales of an FP8 weight are in the same file, because they are computed together.

    Args:
        tensors: name -> shape and dtype.
        max_bytes: the most bytes of a file.
    """
    shards: list[dict[str, tuple[Shape, torch.dtype]]] = [{}]
    size = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_bytes and not published_layout.is_scale(name):
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_index(folder: Path, files: Mapping[str, Tensors]) -> None:
    """Write the index of a checkpoint in several files; no index for one file."""
    if len(files) == 1:
        return
    total_bytes = sum(
        prod(s) * d.itemsize for tensors in files.values() for s, d in tensors.values()
    )
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    atomic_write(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def copy_model_files(source: Path, folder: Path) -> None:
    """Copy the files of `source` other than weights and their description, such as the tokenizer's.
    The copies survive a power cut.

    Args:
        source: a folder in Hugging Face format.
        folder: the new one.

    Raises:
        UserError: for a file that is a link elsewhere.
    """
    for file in sorted(path for pattern in _COPIED_PATTERNS for path in source.glob(pattern)):
        describes_weights = any(file.match(pattern) for pattern in _WEIGHT_METADATA_PATTERNS)
        if file.is_file() and not describes_weights:
            require_inside(file, source, "model.path")
            copy = folder / file.relative_to(source)
            make_folder(copy.parent)
            fsync(shutil.copyfile(file, copy))
    _write_end_tokens(source, folder)
    fsync(folder)


def _write_end_tokens(source: Path, folder: Path) -> None:
    """Write all tokens with which a model of `source` ends a response into the
    generation_config.json of `folder`, so that other engines stop where ours do. Without any there,
    nothing is written."""
    if not (end_ids := [end.id for end in end_tokens(source)]):
        return
    path = folder / END_TOKEN_FILES
    settings = read_json(path, END_TOKEN_FILES) if path.is_file() else {}
    if settings.get("eos_token_id") not in (end_ids, *end_ids[: len(end_ids) == 1]):
        settings["eos_token_id"] = end_ids if len(end_ids) > 1 else end_ids[0]
        atomic_write(path, json.dumps(settings, indent=2) + "\n")


def write_config(
    source: Path, folder: Path, dtype: torch.dtype, with_mtp: bool, with_score: bool = False
) -> None:
    """Write the config.json of `source`, changed to describe the weights in `folder`.

    Args:
        source: a folder in Hugging Face format.
        folder: the new one.
        dtype: the dtype of the weights; float8_e4m3fn for the published FP8 layout, whose other
            tensors are bf16.
        with_mtp: whether the weights have the MTP layers.
        with_score: whether they are a score model's, also if `source` is a language model's.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # For loaders these take precedence over the files.
    quantization = config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if dtype == torch.float8_e4m3fn:
        config["dtype"] = "bfloat16"
        config["quantization_config"] = quantization or published_layout.FP8_CONFIG
    config |= implied_settings(config)
    if not with_mtp:
        for name in ("num_nextn_predict_layers", "num_mtp_layers"):
            if name in config:
                config[name] = 0
    if with_score and not has_score_head(config):
        config = score_model_config(config)
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
