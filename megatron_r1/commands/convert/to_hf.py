"""A Megatron checkpoint as a Hugging Face folder."""

import os
from argparse import Namespace
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path

import torch

from megatron_r1.base.errors import UserError
from megatron_r1.base.files import fsync
from megatron_r1.commands.convert import parts, reload_check
from megatron_r1.commands.convert.sources import (
    check_manifest,
    find_checkpoint,
    find_hf_files,
    fingerprint,
    read_config,
    read_supported_config,
    refuse_inside,
)
from megatron_r1.commands.convert.work_folder import WorkFolder
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.weights.stacked import stacked_part
from megatron_r1.models.weights.stored import fp8, fp8_blocks
from megatron_r1.models.weights.stored.hf_folder import (
    carry_files,
    split_into_files,
    write_config,
    write_index,
)
from megatron_r1.models.weights.stored.hf_weights import KnownScales
from megatron_r1.models.weights.stored.megatron_weights import MegatronWeights
from megatron_r1.models.weights.stored.raw import write_at
from megatron_r1.models.weights.stored.safetensors_file import plan_file, stored_tensors
from megatron_r1.reporting.wording import counted
from megatron_r1.trainer.checkpoints import manifest

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ExportJob:
    """The task of every worker. hf_files: the folder of the model's config.json."""

    checkpoint: Path
    hf_files: Path
    folder: Path
    dtype: torch.dtype


def run(chosen: Namespace) -> int:
    """Convert; then compare the result with the checkpoint, unless --no-check."""
    found = find_checkpoint(chosen.checkpoint)
    checkpoint = found.folder
    refuse_inside(chosen.out, checkpoint)
    # First, as files that are missing could not be read.
    check_manifest(found, "size" if chosen.checksums == "full" else chosen.checksums, chosen)
    hf_files = find_hf_files(checkpoint, chosen.config)
    hf = read_supported_config(hf_files, checkpoint)
    with MegatronWeights(checkpoint, hf) as weights:
        dtype = weights.dtype
        if chosen.dtype:
            dtype = FP8 if chosen.dtype == "fp8" else getattr(torch, chosen.dtype)
        with_mtp = weights.with_mtp
    if dtype == FP8:
        fp8.check_layout(hf)
    files = split_into_files(hf_tensors_on_disk(hf, dtype, with_mtp), chosen.max_file_bytes)
    plan = {
        "checkpoint": str(checkpoint.resolve()),
        "checkpoint's files": fingerprint(checkpoint),
        "dtype": str(dtype).removeprefix("torch."),
        "max-file-bytes": chosen.max_file_bytes,
    }
    work = WorkFolder(chosen.out, plan)
    work.check_space(sum(plan_file(tensors).num_bytes for tensors in files.values()))
    # A file is begun only after this check, so an existing one shows that it was passed.
    if chosen.checksums == "full" and not any(work.path.glob("*.safetensors")):
        try:
            check_manifest(found, "full", chosen)
        except UserError:
            work.abandon_empty()
            raise
    job = ExportJob(checkpoint, hf_files, work.path, dtype)
    parts.run(partial(write_file, job), list(files.items()), chosen.workers)
    carry_files(hf_files, work.path)
    write_config(hf_files, work.path, dtype, with_mtp, has_score_head(hf))
    write_index(work.path, files)
    if not chosen.no_check:
        reload_check.check(checkpoint, hf_files, work.path, dtype, chosen.workers)
    work.finish()
    if not (checkpoint / manifest.NAME).is_file():
        print(f"{checkpoint} has no {manifest.NAME}: no checksum of it was verified")
    tensors = counted(sum(map(len, files.values())), "Hugging Face tensor")
    print(f"{chosen.out}: {tensors} in {counted(len(files), 'file')}")
    return 0


def hf_tensors_on_disk(hf: dict, dtype: torch.dtype, with_mtp: bool) -> dict:
    """Return {name: (shape, dtype)}; FP8 as published: projections with scales, others in bf16."""
    if dtype != FP8:
        return stored_tensors(hf, dtype, with_mtp=with_mtp)
    tensors = {}
    plain = stored_tensors(hf, torch.bfloat16, with_mtp=with_mtp)
    for name, (shape, kept) in plain.items():
        tensors[name] = (shape, FP8 if fp8.is_quantized(name) else kept)
        if fp8.is_quantized(name):
            tensors[fp8.scale_name(name)] = (fp8.scale_shape(shape), torch.float32)
    return tensors


def write_file(job: ExportJob, part: tuple[str, dict]) -> None:
    """Write one safetensors file atomically, unless it exists."""
    name, tensors = part
    path = job.folder / name
    if path.exists():
        return
    plan, partial_path = plan_file(tensors), path.with_name(f".{name}.tmp")
    file = os.open(partial_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(file, 0, plan.num_bytes)
        os.pwrite(file, plan.header, 0)
        for tensor, placed in plan.tensors.items():
            if not fp8.is_scale(tensor):
                scales = plan.tensors.get(fp8.scale_name(tensor))
                _write_tensor(job, file, tensor, placed, scales)
    finally:
        os.close(file)
    fsync(partial_path)
    partial_path.rename(path)
    fsync(job.folder)


def _write_tensor(job: ExportJob, file: int, name: str, placed, scales) -> None:
    weights, known, stacked = _inputs(job)
    row = prod(placed.shape[1:]) * placed.dtype.itemsize
    for expert, parts_of_expert in enumerate(stacked.get(name, ())):
        values = torch.empty(placed.shape[1:], dtype=placed.dtype)
        for tensor, part in parts_of_expert:
            own = part.of(values)
            own.copy_(weights.read(tensor, 0, 0, len(own)))
        write_at(file, placed.offset + expert * row, values)
    if name in stacked:
        return
    scale_row = scales.shape[1] * scales.dtype.itemsize if scales else 0
    for first, count in parts.stripes(placed.shape, fp8.BLOCK if scales else 1):
        values = weights.read(name, 0, first, count)
        if scales:
            values, inverse = fp8_blocks.quantize(
                values, known.rows(name, first, count), power_of_two=known.power_of_two
            )
            write_at(file, scales.offset + first // fp8.BLOCK * scale_row, inverse)
        write_at(file, placed.offset + first * row, values.to(placed.dtype))


@cache
def _inputs(job: ExportJob) -> tuple[MegatronWeights, KnownScales, dict[str, list]]:
    """Open the inputs, once per process; with them the (tensor, part) pairs of each expert in every
    tensor that has all experts of a layer."""
    hf = read_config(job.hf_files, job.checkpoint)
    weights = MegatronWeights(job.checkpoint, hf)
    stacked: dict[str, list] = {}
    for tensor in weights.tensors:
        if part := stacked_part(hf, tensor):
            experts = stacked.setdefault(part.name, [[] for _ in range(hf["n_routed_experts"])])
            experts[part.expert].append((tensor, part))
    return weights, KnownScales(job.hf_files, hf), stacked
