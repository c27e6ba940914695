"""A safetensors file before it exists: which tensors it holds, and where each will lie."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch

from megatron_r1.weights.layout import Shape, hf_tensors

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3"}


@dataclass(frozen=True)
class Placed:
    """One tensor of a file: shape, dtype and the file offset of its first byte."""

    shape: Shape
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file before it exists: its header, its tensors in order, its size."""

    header: bytes
    tensors: dict[str, Placed]
    num_bytes: int


def stored_tensors(
    hf: dict, dtype: torch.dtype, *, with_mtp: bool, names: Collection[str] | None = None
) -> dict[str, tuple[Shape, torch.dtype]]:
    """name -> (shape, dtype on disk) of what an export holds; ValueError for unknown `names`."""
    own = {name for name, (_, kept) in hf_tensors({**hf, "dtype": "any"}).items() if kept != "any"}
    tensors = {
        name: (shape, torch.float32 if name in own else dtype)
        for name, (shape, _) in hf_tensors(hf, with_mtp=with_mtp).items()
    }
    if names is None:
        return tensors
    if unknown := sorted(set(names) - tensors.keys()):
        raise ValueError(f"the model has no tensor {', '.join(unknown)}")
    return {name: kept for name, kept in tensors.items() if name in set(names)}


def plan_file(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> FilePlan:
    """Lay tensors out: 8 bytes of header length, JSON padded to 8, data without gaps."""
    # Widest dtype first, so that without gaps every tensor still starts at a multiple of its
    # element size.
    order = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    entries, placed, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, (shape, dtype) in order:
        start, end = end, end + prod(shape) * dtype.itemsize
        stored = _STORED[str(dtype).removeprefix("torch.")]
        entries[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, end]}
        placed[name] = Placed(shape, dtype, start)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    tensors = {n: Placed(p.shape, p.dtype, p.offset + len(header)) for n, p in placed.items()}
    return FilePlan(header, tensors, len(header) + end)
