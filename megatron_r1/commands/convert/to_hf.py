"""A Megatron checkpoint as a Hugging Face folder.

The last step compares transformers' logits of the result with Megatron's of the checkpoint. A
model that does not fit into memory is compared tensor by tensor instead, which verifies the
values, but not that a library loads them."""

import os
from argparse import Namespace
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path

import torch

from megatron_r1.base.errors import UserError
from megatron_r1.base.files import fsync
from megatron_r1.commands.convert import conversion_parts
from megatron_r1.commands.convert.reload_check import check_reload
from megatron_r1.commands.convert.sources import (
    check_manifest,
    find_checkpoint,
    find_hf_files,
    fingerprint_source,
    read_config,
    read_supported_config,
    require_outside,
)
from megatron_r1.commands.convert.work_folder import WorkFolder
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.models.weights.formats import published_layout, quantized_blocks
from megatron_r1.models.weights.formats.hf_writer import (
    Tensors,
    copy_model_files,
    split_into_files,
    write_config,
    write_index,
)
from megatron_r1.models.weights.formats.known_scales import KnownScales
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights
from megatron_r1.models.weights.formats.stacked_experts import StackedPart, stacked_part
from megatron_r1.models.weights.formats.tensor_files import (
    PlannedTensor,
    plan_file,
    stored_tensors,
    write_at,
)
from megatron_r1.reporting.formatting import format_count
from megatron_r1.trainer.checkpoints import manifest

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ExportJob:
    """The task of every worker.

    Attributes:
        checkpoint: the checkpoint's folder.
        hf_files: the folder of the model's config.json.
        folder: the unfinished Hugging Face folder.
        dtype: the dtype to write, or FP8."""

    checkpoint: Path
    hf_files: Path
    folder: Path
    dtype: torch.dtype


def run(args: Namespace) -> int:
    """Convert; then compare the result with the checkpoint, unless --no-check."""
    checkpoint_folder = find_checkpoint(args.checkpoint)
    checkpoint = checkpoint_folder.folder
    require_outside(args.out, checkpoint)
    # First, as files that are missing could not be read.
    check_manifest(checkpoint_folder, "size" if args.checksums == "full" else args.checksums, args)
    hf_files = find_hf_files(checkpoint, args.config)
    hf_config = read_supported_config(hf_files, checkpoint)
    with MegatronWeights(checkpoint, hf_config) as weights:
        dtype = weights.dtype
        if args.dtype:
            dtype = FP8 if args.dtype == "fp8" else getattr(torch, args.dtype)
        with_mtp = weights.with_mtp
    if dtype == FP8:
        published_layout.check_fp8_layout(hf_config)
    files = split_into_files(_hf_tensors_on_disk(hf_config, dtype, with_mtp), args.max_file_bytes)
    plan = {
        "checkpoint": str(checkpoint.resolve()),
        "checkpoint's files": fingerprint_source(checkpoint),
        "dtype": str(dtype).removeprefix("torch."),
        "max-file-bytes": args.max_file_bytes,
    }
    work = WorkFolder(args.out, plan)
    work.check_space(sum(plan_file(tensors).num_bytes for tensors in files.values()))
    # A file is begun only after this check, so an existing one shows that it was passed.
    if args.checksums == "full" and not any(work.path.glob("*.safetensors")):
        try:
            check_manifest(checkpoint_folder, "full", args)
        except UserError:
            work.abandon_empty()
            raise
    job = ExportJob(checkpoint, hf_files, work.path, dtype)
    conversion_parts.run_parts(partial(_write_file, job), list(files.items()), args.workers)
    copy_model_files(hf_files, work.path)
    write_config(hf_files, work.path, dtype, with_mtp, has_score_head(hf_config))
    write_index(work.path, files)
    if not args.no_check:
        check_reload(checkpoint, hf_files, work.path, dtype, args.workers)
    work.finish()
    if not (checkpoint / manifest.MANIFEST).is_file():
        print(f"{checkpoint} has no {manifest.MANIFEST}: no checksum of it was verified")
    tensors = format_count(sum(map(len, files.values())), "Hugging Face tensor")
    print(f"{args.out}: {tensors} in {format_count(len(files), 'file')}")
    return 0


def _hf_tensors_on_disk(hf_config: HFConfig, dtype: torch.dtype, with_mtp: bool) -> Tensors:
    """Return {name: (shape, dtype)}; FP8 as published: projections with scales, others in bf16."""
    if dtype != FP8:
        return stored_tensors(hf_config, dtype, with_mtp=with_mtp)
    tensors = {}
    bf16_tensors = stored_tensors(hf_config, torch.bfloat16, with_mtp=with_mtp)
    for name, (shape, stored_dtype) in bf16_tensors.items():
        tensors[name] = (shape, FP8 if published_layout.is_quantized(name) else stored_dtype)
        if published_layout.is_quantized(name):
            tensors[published_layout.scale_name(name)] = (
                published_layout.scale_shape(shape),
                torch.float32,
            )
    return tensors


def _write_file(job: ExportJob, part: tuple[str, Tensors]) -> None:
    """Write one safetensors file atomically, unless it exists."""
    name, tensors = part
    path = job.folder / name
    if path.exists():
        return
    plan, partial_path = plan_file(tensors), path.with_name(f".{name}.tmp")
    file = os.open(partial_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.posix_fallocate(file, 0, plan.num_bytes)
        os.pwrite(file, plan.header, 0)
        for tensor, placed in plan.tensors.items():
            if not published_layout.is_scale(tensor):
                scales = plan.tensors.get(published_layout.scale_name(tensor))
                _write_tensor(job, file, tensor, placed, scales)
    finally:
        os.close(file)
    fsync(partial_path)
    partial_path.rename(path)
    fsync(job.folder)


def _write_tensor(
    job: ExportJob, file: int, name: str, planned: PlannedTensor, scales: PlannedTensor | None
) -> None:
    weights, known_scales, stacked = _open_inputs(job)
    row = prod(planned.shape[1:]) * planned.dtype.itemsize
    for expert, parts_of_expert in enumerate(stacked.get(name, ())):
        values = torch.empty(planned.shape[1:], dtype=planned.dtype)
        for tensor, part in parts_of_expert:
            part_values = part.select(values)
            part_values.copy_(weights.read(tensor, 0, 0, len(part_values)))
        write_at(file, planned.offset + expert * row, values)
    if name in stacked:
        return
    scale_row = scales.shape[1] * scales.dtype.itemsize if scales else 0
    for first, count in conversion_parts.row_stripes(
        planned.shape, published_layout.FP8_BLOCK_SIZE if scales else 1
    ):
        values = weights.read(name, 0, first, count)
        if scales:
            values, inverse = quantized_blocks.quantize_fp8(
                values,
                known_scales.rows(name, first, count),
                power_of_two=known_scales.power_of_two,
            )
            write_at(
                file, scales.offset + first // published_layout.FP8_BLOCK_SIZE * scale_row, inverse
            )
        write_at(file, planned.offset + first * row, values.to(planned.dtype))


@cache
def _open_inputs(
    job: ExportJob,
) -> tuple[MegatronWeights, KnownScales, dict[str, list[list[tuple[str, StackedPart]]]]]:
    """Open the inputs, once per process; with them the (tensor, part) pairs of each expert in every
    tensor that has all experts of a layer."""
    hf_config = read_config(job.hf_files, job.checkpoint)
    weights = MegatronWeights(job.checkpoint, hf_config)
    stacked: dict[str, list[list[tuple[str, StackedPart]]]] = {}
    for tensor in weights.tensors:
        if part := stacked_part(hf_config, tensor):
            experts = stacked.setdefault(
                part.name, [[] for _ in range(hf_config["n_routed_experts"])]
            )
            experts[part.expert].append((tensor, part))
    return weights, KnownScales(job.hf_files, hf_config), stacked
