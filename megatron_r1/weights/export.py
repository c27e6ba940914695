"""A complete Hugging Face folder: weights, configuration, tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from megatron_r1.weights.local import has_mtp
from megatron_r1.weights.writing import on_first_rank, plan_file, stored_tensors, write_files

# Everything small a model folder carries beside its weights: configuration, tokenizer, chat
# template.
_CARRIED = (".json", ".jinja", ".txt", ".model")
_INDEX = "model.safetensors.index.json"


def save_hf(
    model_chunks: Sequence,
    hf: dict,
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `out_folder`, which transformers and vLLM load; call on every rank.

    Beside the weights it gets the configuration and tokenizer files of `source_folder`; both
    folders must be seen by all ranks. The folder appears complete or not at all
    (an existing one is replaced). Weights are split into files of at most max_shard_bytes, but for
    larger single tensors. Raises ValueError on every rank when something cannot be written.
    """
    out = Path(out_folder)
    unfinished = out.with_name(out.name + ".incomplete")
    with_mtp = has_mtp(model_chunks)
    tensors = stored_tensors(hf, dtype, with_mtp=with_mtp)
    shards = _shards(tensors, max_shard_bytes)
    names = _file_names(len(shards))
    on_first_rank(lambda: _begin(unfinished, Path(source_folder), dtype, with_mtp))
    plans = {unfinished / n: plan_file(s) for n, s in zip(names, shards, strict=True)}
    write_files(model_chunks, hf, plans, durable=True)
    on_first_rank(lambda: _finish(unfinished, out, dict(zip(names, shards, strict=True))))


def _shards(tensors: dict, max_bytes: int) -> list[dict]:
    shards, size = [{}], 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += num_bytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _begin(unfinished: Path, source: Path, dtype: torch.dtype, with_mtp: bool) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _CARRIED and file.name not in (_INDEX, "config.json"):
            shutil.copyfile(file, unfinished / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # Loaders believe these over the files: the weights are plain, and of this dtype.
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if not with_mtp:
        for name in ("num_nextn_predict_layers", "num_mtp_layers"):
            if name in config:
                config[name] = 0
    _write_text(unfinished / "config.json", json.dumps(config, indent=2) + "\n")


def _finish(unfinished: Path, out: Path, shards: dict[str, dict]) -> None:
    if len(shards) > 1:
        total = sum(prod(s) * d.itemsize for shard in shards.values() for s, d in shard.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in shards.items() for name in shard},
        }
        _write_text(unfinished / _INDEX, json.dumps(index, indent=2) + "\n")
    # A folder cannot be renamed over another: for an instant neither name exists, but both are on
    # disk.
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        os.rename(out, previous)
    os.rename(unfinished, out)
    shutil.rmtree(previous, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
