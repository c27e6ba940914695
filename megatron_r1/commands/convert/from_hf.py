"""A Hugging Face folder as a Megatron checkpoint of the weights."""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path

import torch
from pydantic import TypeAdapter

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.commands.convert import conversion_parts
from megatron_r1.commands.convert.sources import (
    HF_FILES,
    fingerprint_source,
    is_hf,
    read_config,
    read_supported_config,
    require_outside,
)
from megatron_r1.commands.convert.work_folder import WorkFolder
from megatron_r1.models.weights import splits
from megatron_r1.models.weights.formats import published_layout
from megatron_r1.models.weights.formats.dcp_writer import (
    Chunk,
    WrittenChunk,
    write_chunks,
    write_metadata,
)
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.hf_writer import copy_model_files, write_config
from megatron_r1.models.weights.formats.known_scales import SCALES_FILE
from megatron_r1.models.weights.formats.megatron_weights import (
    StoredLayout,
    StoredParameter,
    stored_layout,
)
from megatron_r1.models.weights.formats.tensor_files import plan_file, write_at
from megatron_r1.reporting.formatting import format_count
from megatron_r1.trainer.checkpoints import manifest

CHUNK_BYTES = 32 << 20
"""Largest chunk. A worker holds a few of them; Megatron loads chunks of any size."""

FILE_BYTES = 1 << 30
"""Size of a file, and so the work that a kill can lose."""


@dataclass(frozen=True)
class PlannedChunk:
    """A chunk to write and the rows of Hugging Face tensors in it.

    Attributes:
        chunk: where the rows are in the parameter.
        shape: the chunk's, without prepended axes.
        runs: their `local_start` is the chunk's row.
        num_bytes: its bytes in the dtype that is written."""

    chunk: Chunk
    shape: tuple[int, ...]
    runs: tuple[splits.Piece, ...]
    num_bytes: int


@dataclass(frozen=True)
class ImportJob:
    """The task of every worker.

    Attributes:
        hf_folder: the Hugging Face folder.
        folder: the unfinished checkpoint.
        dtype: the dtype of the other tensors.
        stored_dtypes: dtypes of the tensors that keep theirs, by key."""

    hf_folder: Path
    folder: Path
    dtype: torch.dtype
    stored_dtypes: dict[str, str]

    def dtype_of(self, key: str) -> torch.dtype:
        """Return the dtype in which the tensor `key` is stored: its own, or the job's."""
        return getattr(torch, self.stored_dtypes[key]) if key in self.stored_dtypes else self.dtype


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its chunks and its manifest entry."""

    chunks: list[WrittenChunk]
    entry: manifest.FileEntry


WRITTEN_FILE_ADAPTER = TypeAdapter(WrittenFile)


def run(args: Namespace) -> int:
    """Convert; OUT appears when it is complete.

    Raises:
        UserError: the folder is no supported model, or the disk has too little room.
    """
    if not is_hf(args.hf):
        fault = "has no config.json" if args.hf.is_dir() else "is not a folder"
        if (args.hf / "metadata.json").is_file():
            fault = "is a Megatron checkpoint, which to-hf converts"
        raise UserError(
            f"{args.hf} {fault}: give a Hugging Face model folder",
            key="hf",
            cause=Cause.NOT_FOUND,
        )
    require_outside(args.out, args.hf)
    hf_config = read_supported_config(args.hf)
    with HFWeights(args.hf, hf_config) as weights:
        # Whether it has the MTP layers that its config.json names.
        first_mtp = f"model.layers.{hf_config['num_hidden_layers']}."
        with_mtp = any(name.startswith(first_mtp) for name in weights.tensors)
        weights.check(with_mtp)
        weights.check_repeated()
        stored = weights.tensors["model.embed_tokens.weight"][1]
    dtype = getattr(torch, args.dtype or stored)
    engine = args.names == "transformer_engine"
    layout = stored_layout(hf_config, with_mtp=with_mtp, transformer_engine=engine)
    plan = {
        "source": str(args.hf.resolve()),
        "source's files": fingerprint_source(args.hf),
        "dtype": str(dtype).removeprefix("torch."),
        "names": args.names,
    }
    work = WorkFolder(args.out, plan)
    job = ImportJob(args.hf, work.path, dtype, layout.dtypes)
    # torch.save adds up to 2 KiB to every chunk.
    sizes = (prod(s) * job.dtype_of(key).itemsize for key, s in layout.shapes.items())
    work.check_space(sum(sizes) + 2048 * len(layout.slots) + (16 << 20))
    files = group_into_files(
        p for slot in layout.slots for p in split_rows(slot, job.dtype_of(slot.key).itemsize)
    )
    outputs = conversion_parts.run_parts(
        partial(_write_file, job), list(enumerate(files)), args.workers
    )
    _finish_checkpoint(work, job, layout, outputs, with_mtp)
    tensors = format_count(len(layout.shapes), "Megatron tensor")
    print(f"{args.out}: {tensors}, {plan['dtype']}, in {format_count(len(files), 'file')}")
    return 0


def split_rows(slot: StoredParameter, itemsize: int) -> Iterator[PlannedChunk]:
    """Yield the parameter in pieces of whole rows, of at most CHUNK_BYTES."""
    row = prod(slot.shape[1:]) * itemsize
    step = max(1, CHUNK_BYTES // row)
    ones = (1,) * len(slot.index)
    zeros = (0,) * (len(slot.shape) - 1)
    for first in range(0, slot.shape[0], step):
        count = min(step, slot.shape[0] - first)
        shape = (count, *slot.shape[1:])
        chunk = Chunk(slot.key, (*slot.index, first, *zeros), (*ones, *shape))
        runs = tuple(splits.pieces_of_rows(slot.runs, first, count))
        yield PlannedChunk(chunk, shape, runs, count * row)


def group_into_files(pieces: Iterable[PlannedChunk]) -> list[list[PlannedChunk]]:
    """Group consecutive pieces into files of about FILE_BYTES."""
    files: list[list[PlannedChunk]] = []
    size = FILE_BYTES
    for piece in pieces:
        if size + piece.num_bytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.num_bytes
    return files


def _write_file(job: ImportJob, part: tuple[int, list[PlannedChunk]]) -> WrittenFile:
    """Write one `.distcp` file atomically, unless it exists; return its contents.

    The list of its contents is written before the file gets its name."""
    number, pieces = part
    path = job.folder / f"__{number}_0.distcp"
    contents = _contents_path(job.folder, number)
    if path.exists() and contents.exists():
        return WRITTEN_FILE_ADAPTER.validate_json(contents.read_bytes())
    unnamed = path.with_name(f".{path.name}.tmp")
    chunks = write_chunks(unnamed, _read_chunk_values(job, pieces))
    chunks = [WrittenChunk(w.chunk, path.name, w.offset, w.length) for w in chunks]
    output = WrittenFile(chunks, manifest.file_entry(unnamed))
    atomic_write(contents, WRITTEN_FILE_ADAPTER.dump_json(output).decode())
    unnamed.rename(path)
    return output


def _read_chunk_values(
    job: ImportJob, pieces: list[PlannedChunk]
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    weights = _open_source(job.hf_folder)
    for piece in pieces:
        values = torch.empty(piece.shape, dtype=job.dtype_of(piece.chunk.key))
        for run in piece.runs:
            rows = weights.read(run.hf_name, 0, run.hf_start, run.length)
            values[run.local_start : run.local_start + run.length] = rows
        yield piece.chunk, values.view(piece.chunk.sizes)


@cache
def _open_source(folder: Path) -> HFWeights:
    """Open the source, once per process."""
    return HFWeights(folder, read_config(folder))


def _finish_checkpoint(
    work: WorkFolder,
    job: ImportJob,
    layout: StoredLayout,
    outputs: list[WrittenFile],
    with_mtp: bool,
) -> None:
    dtypes = {key: job.dtype_of(key) for key in layout.shapes}
    write_metadata(work.path, layout.shapes, dtypes, [w for d in outputs for w in d.chunks])
    _write_hf_files(job, with_mtp)
    hashed = {file.chunks[0].file: file.entry for file in outputs}

    def complete(folder: Path) -> None:
        for number in range(len(outputs)):
            _contents_path(folder, number).unlink(missing_ok=True)
        manifest.write_manifest(folder, hashed)

    work.finish(complete)


def _write_hf_files(job: ImportJob, with_mtp: bool) -> None:
    """Write configuration, tokenizer and FP8 scales, which to-hf reads."""
    folder = job.folder / HF_FILES
    folder.mkdir(exist_ok=True)
    copy_model_files(job.hf_folder, folder)
    weights = _open_source(job.hf_folder)
    quantized = [
        name for name, (_, dtype) in weights.tensors.items() if dtype == published_layout.FP8_DTYPE
    ]
    write_config(job.hf_folder, folder, torch.float8_e4m3fn if quantized else job.dtype, with_mtp)
    if not quantized:
        return
    shapes = {name: published_layout.scale_shape(weights.tensors[name][0]) for name in quantized}
    plan = plan_file(
        {published_layout.scale_name(n): (s, torch.float32) for n, s in shapes.items()}
    )
    with open(folder / SCALES_FILE, "wb") as file:
        file.write(plan.header)
        file.flush()
        for name in quantized:
            scales = weights.scales(name)
            assert scales is not None, f"{name} is FP8"
            write_at(file.fileno(), plan.tensors[published_layout.scale_name(name)].offset, scales)


def _contents_path(folder: Path, number: int) -> Path:
    return folder / f".__{number}_0.distcp.json"
