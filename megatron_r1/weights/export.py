"""A complete Hugging Face folder written by the ranks that hold the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_r1.models.hf_config import has_score_head
from megatron_r1.weights.local import has_mtp
from megatron_r1.weights.stored.file_plan import plan_file, stored_tensors
from megatron_r1.weights.stored.hf_folder import (
    carry_files,
    split_into_files,
    write_config,
    write_index,
)
from megatron_r1.weights.writing import on_first_rank, write_files


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
    out, source = Path(out_folder), Path(source_folder)
    unfinished = out.with_name(out.name + ".incomplete")
    with_mtp = has_mtp(model_chunks)
    files = split_into_files(stored_tensors(hf, dtype, with_mtp=with_mtp), max_shard_bytes)

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        carry_files(source, unfinished)
        write_config(source, unfinished, dtype, with_mtp, has_score_head(hf))

    def finish() -> None:
        write_index(unfinished, files)
        _replace(unfinished, out)

    on_first_rank(begin)
    plans = {unfinished / name: plan_file(tensors) for name, tensors in files.items()}
    write_files(model_chunks, hf, plans, durable=True)
    on_first_rank(finish)


def _replace(unfinished: Path, out: Path) -> None:
    # A folder cannot be renamed over another: for an instant neither name exists, but both are on
    # disk.
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        os.rename(out, previous)
    os.rename(unfinished, out)
    shutil.rmtree(previous, ignore_errors=True)
