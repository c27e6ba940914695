"""The safetensors format: 8 bytes of header length, a JSON header, tensors without gaps.

Files are read here, not by the safetensors library, which maps them (see raw.py), and planned
before they exist, so that all ranks of an export know where each tensor will lie."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_r1.base.files.safetensors_header import open_file
from megatron_r1.models.weights.layout import Shape
from megatron_r1.models.weights.stacked import published_tensors
from megatron_r1.models.weights.stored.raw import read_box

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes, those that weights have."""
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class SafetensorsFile:
    """An open file; `tensors` by name. Raises UserError, naming the file, when it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.file, self.tensors = open_file(path)

    def close(self) -> None:
        os.close(self.file)

    def read(self, name: str, starts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return a rectangle of a tensor, of shape `sizes`, in its stored dtype."""
        at = self.tensors[name]
        return read_box(self.file, at.offset, at.shape, _TYPES[at.dtype], starts, sizes)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a planned file: shape, dtype and the file offset of its first byte."""

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
    tensors: dict[str, PlannedTensor]
    num_bytes: int


def stored_tensors(
    hf: dict, dtype: torch.dtype, *, with_mtp: bool, names: Collection[str] | None = None
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return name -> (shape, dtype on disk) of the tensors of an export.

    names: only these; ValueError for unknown ones."""
    tensors = {
        name: (shape, dtype if kept == "any" else torch.float32)
        for name, (shape, kept) in published_tensors({**hf, "dtype": "any"}, with_mtp).items()
    }
    if names is None:
        return tensors
    if unknown := sorted(set(names) - tensors.keys()):
        raise ValueError(f"the model has no tensor {', '.join(unknown)}")
    return {name: kept for name, kept in tensors.items() if name in set(names)}


def plan_file(tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> FilePlan:
    """Return the plan of a file with these tensors; its header is padded to 8 bytes."""
    # Widest dtype first, so that without gaps every tensor still starts at a multiple of its
    # element size.
    order = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, (shape, dtype) in order:
        starts[name], end = end, end + prod(shape) * dtype.itemsize
        offsets = [starts[name], end]
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed = {name: PlannedTensor(*tensors[name], len(header) + starts[name]) for name, _ in order}
    return FilePlan(header, placed, len(header) + end)
