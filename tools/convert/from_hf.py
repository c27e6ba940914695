"""a Hugging Face folder as a Megatron checkpoint of the weights"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import prod
from pathlib import Path

import parts
import torch
from chunks import Piece, cut, group
from sources import (
    HF_FILES,
    fingerprint,
    is_hf,
    read_config,
    read_supported_config,
    refuse_inside,
)
from work_folder import WorkFolder

from megatron_r1.files import atomic_write
from megatron_r1.reporting.wording import counted
from megatron_r1.training.checkpoints import manifest
from megatron_r1.weights.stored import fp8
from megatron_r1.weights.stored.dcp_writing import Chunk, Written, write_chunks, write_metadata
from megatron_r1.weights.stored.hf_folder import carry_files, write_config
from megatron_r1.weights.stored.hf_weights import SCALES_FILE, HfWeights
from megatron_r1.weights.stored.megatron_names import StoredLayout, stored_layout
from megatron_r1.weights.stored.raw import write_at
from megatron_r1.weights.stored.safetensors_file import plan_file


@dataclass(frozen=True)
class Job:
    """What every worker needs. dtypes: of tensors that keep their own, by key."""

    hf: Path
    folder: Path
    dtype: torch.dtype
    own_dtypes: dict[str, str]

    def dtype_of(self, key: str) -> torch.dtype:
        return getattr(torch, self.own_dtypes[key]) if key in self.own_dtypes else self.dtype


@dataclass(frozen=True)
class Done:
    """A finished file: its chunks, and its line in the manifest."""

    chunks: list[Written]
    entry: manifest.Entry


def run(chosen: Namespace) -> int:
    """Convert; the folder appears when it is whole."""
    if not is_hf(chosen.hf):
        raise ValueError(f"{chosen.hf} has no config.json: give a Hugging Face model folder")
    refuse_inside(chosen.out, chosen.hf)
    hf = read_supported_config(chosen.hf)
    with HfWeights(chosen.hf, hf) as weights:
        with_mtp = _has_mtp(weights, hf)
        weights.check(with_mtp)
        stored = weights.tensors["model.embed_tokens.weight"][1]
    dtype = getattr(torch, chosen.dtype or stored)
    engine = chosen.names == "transformer_engine"
    found = stored_layout(hf, with_mtp=with_mtp, transformer_engine=engine)
    plan = {
        "source": str(chosen.hf.resolve()),
        "source's files": fingerprint(chosen.hf),
        "dtype": str(dtype).removeprefix("torch."),
        "names": chosen.names,
    }
    work = WorkFolder(chosen.out, plan)
    job = Job(chosen.hf, work.path, dtype, found.dtypes)
    # 2 KiB for what torch.save adds to every chunk.
    sizes = (prod(s) * job.dtype_of(key).itemsize for key, s in found.shapes.items())
    work.check_space(sum(sizes) + 2048 * len(found.slots) + (16 << 20))
    files = group(p for slot in found.slots for p in cut(slot, job.dtype_of(slot.key).itemsize))
    done = parts.run(partial(write_file, job), list(enumerate(files)), chosen.workers)
    _finish(work, job, found, done, with_mtp)
    print(
        f"{chosen.out}: {counted(len(found.shapes), 'Megatron tensor')}, {plan['dtype']}, in "
        f"{counted(len(files), 'file')}"
    )
    return 0


def write_file(job: Job, part: tuple[int, list[Piece]]) -> Done:
    """Write one `.distcp` file, whole or not at all; where it is there, only tell what it holds.

    What it holds is written down before it gets its name.
    """
    number, pieces = part
    path = job.folder / f"__{number}_0.distcp"
    about = _about(job.folder, number)
    if path.exists() and about.exists():
        return _told(json.loads(about.read_text(encoding="utf-8")))
    unnamed = path.with_name(f".{path.name}.tmp")
    chunks = write_chunks(unnamed, _values(job, pieces))
    chunks = [Written(w.chunk, path.name, w.offset, w.length) for w in chunks]
    done = Done(chunks, manifest.checksum(unnamed))
    atomic_write(about, json.dumps({"chunks": [asdict(w) for w in chunks], "entry": done.entry}))
    unnamed.rename(path)
    return done


def _values(job: Job, pieces: list[Piece]) -> Iterator[tuple[Chunk, torch.Tensor]]:
    weights = _source(job.hf)
    for piece in pieces:
        values = torch.empty(piece.shape, dtype=job.dtype_of(piece.chunk.key))
        for run in piece.runs:
            found = weights.read(run.hf_name, 0, run.hf_start, run.length)
            values[run.start : run.start + run.length] = found
        yield piece.chunk, values.view(piece.chunk.sizes)


@cache
def _source(folder: Path) -> HfWeights:
    """Opened once per process."""
    return HfWeights(folder, read_config(folder))


def _finish(
    work: WorkFolder, job: Job, found: StoredLayout, done: list[Done], with_mtp: bool
) -> None:
    dtypes = {key: job.dtype_of(key) for key in found.shapes}
    write_metadata(work.path, found.shapes, dtypes, [w for d in done for w in d.chunks])
    _write_hf_files(job, with_mtp)
    hashed = {file.chunks[0].file: file.entry for file in done}

    def last(folder: Path) -> None:
        for number in range(len(done)):
            _about(folder, number).unlink(missing_ok=True)
        manifest.write(folder, hashed)

    work.finish(last)


def _write_hf_files(job: Job, with_mtp: bool) -> None:
    """Configuration, tokenizer and FP8 scales, for the way back."""
    folder = job.folder / HF_FILES
    folder.mkdir(exist_ok=True)
    carry_files(job.hf, folder)
    weights = _source(job.hf)
    quantised = [name for name, (_, dtype) in weights.tensors.items() if dtype == fp8.STORED]
    write_config(job.hf, folder, torch.float8_e4m3fn if quantised else job.dtype, with_mtp)
    if not quantised:
        return
    shapes = {name: fp8.scale_shape(weights.tensors[name][0]) for name in quantised}
    plan = plan_file({fp8.scale_name(n): (s, torch.float32) for n, s in shapes.items()})
    with open(folder / SCALES_FILE, "wb") as file:
        file.write(plan.header)
        file.flush()
        for name in quantised:
            at = plan.tensors[fp8.scale_name(name)].offset
            write_at(file.fileno(), at, weights.scales(name))


def _has_mtp(weights: HfWeights, hf: dict) -> bool:
    """Whether the folder carries the MTP layers its config.json speaks of."""
    first = f"model.layers.{hf['num_hidden_layers']}."
    return any(name.startswith(first) for name in weights.tensors)


def _about(folder: Path, number: int) -> Path:
    return folder / f".__{number}_0.distcp.json"


def _told(about: dict) -> Done:
    chunks = [
        Written(
            Chunk(w["chunk"]["key"], tuple(w["chunk"]["starts"]), tuple(w["chunk"]["sizes"])),
            w["file"],
            w["offset"],
            w["length"],
        )
        for w in about["chunks"]
    ]
    return Done(chunks, manifest.Entry(*about["entry"]))
