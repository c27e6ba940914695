"""Tensors in files, read and written rectangle by rectangle without mapping the files; safetensors
among them: 8 bytes of header length, a JSON header, tensors without gaps.

A mapped page counts as this process's memory, and a converter touches every page of a file; with
reads into a buffer, its memory stays at the size of the buffer. And a mapped page is written back
whole: on a network file system, whose hosts do not see each other's pages, it overwrites what
another host has written next to it. So safetensors files are not read by their library, which maps
them, and they are planned before they exist, so that all ranks of an export know where each tensor
will lie."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.base.files.weight_files import open_safetensors
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats.published_layout import published_tensors
from megatron_r1.models.weights.layout import Shape

STRIPE_BYTES = 16 << 20


def read_region(
    file: int,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    starts: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """Return tensor[starts[0] : starts[0] + sizes[0], …], of shape `sizes`, of the contiguous
    tensor at `offset`, which has `shape` and `dtype`.

    Only the rows of the region are read; where it has only some of the columns, in stripes of
    STRIPE_BYTES.

    Args:
        file: a file descriptor.
        offset: the tensor's offset in the file, in bytes.
        shape: the shape of the whole tensor.
        dtype: the tensor's dtype.
        starts: the region's first index in each dimension.
        sizes: the region's size in each dimension.

    Raises:
        EOFError: when the file is too short."""
    out = torch.empty(tuple(sizes), dtype=dtype)
    if not out.numel():
        return out
    if tuple(sizes[1:]) == tuple(shape[1:]):
        row = prod(shape[1:]) * dtype.itemsize
        _read_into(file, offset + starts[0] * row if starts else offset, out)
    elif len(shape) == 2:
        rows = max(1, STRIPE_BYTES // (shape[1] * dtype.itemsize))
        for first in range(0, sizes[0], rows):
            count = min(rows, sizes[0] - first)
            region = (starts[0] + first, 0), (count, shape[1])
            stripe = read_region(file, offset, shape, dtype, *region)
            out[first : first + count] = stripe[:, starts[1] : starts[1] + sizes[1]]
    else:
        step = prod(shape[1:]) * dtype.itemsize
        for index in range(sizes[0]):
            slice_offset = offset + (starts[0] + index) * step
            out[index] = read_region(file, slice_offset, shape[1:], dtype, starts[1:], sizes[1:])
    return out


def _read_into(file: int, offset: int, out: Tensor) -> None:
    """Fill the contiguous `out` from `offset`; EOFError when the file is too short."""
    buffer = as_bytes(out).numpy().data
    while buffer:
        # One call reads 2 GiB at most (read(2)), and may read less.
        count = os.preadv(file, [buffer], offset)
        if not count:
            raise EOFError(f"{len(buffer)} bytes are missing at offset {offset}")
        buffer, offset = buffer[count:], offset + count


def write_at(file: int, offset: int, values: Tensor) -> None:
    """Write all of a tensor, contiguously, at `offset`.

    Args:
        file: descriptor of an open file.
        offset: where they go in the file, in bytes.
        values: the values to write, of any dtype.
    """
    _write_bytes(file, offset, as_bytes(values.contiguous()).numpy().data)


def _write_bytes(file: int, offset: int, buffer: memoryview) -> None:
    while buffer:
        count = os.pwrite(file, buffer, offset)
        buffer, offset = buffer[count:], offset + count


def write_region(
    file: int, offset: int, shape: Sequence[int], starts: Sequence[int], box: Tensor
) -> None:
    """Write the region tensor[starts[0] : starts[0] + len(box), …] of the tensor of `read_region`.

    Only its own bytes are written, run by run where it has only some of the columns.

    Args:
        file: an open file's descriptor.
        offset: where the whole tensor begins in the file, in bytes.
        shape: the whole tensor's shape.
        starts: first index of the region in each dimension.
        box: the region, in the dtype of the stored tensor."""
    if not box.numel():
        return
    if tuple(box.shape[1:]) == tuple(shape[1:]):
        row = prod(shape[1:]) * box.dtype.itemsize
        write_at(file, offset + starts[0] * row if starts else offset, box)
    elif len(shape) == 2:
        pitch, width = shape[1] * box.dtype.itemsize, box.shape[1] * box.dtype.itemsize
        first = offset + starts[0] * pitch + starts[1] * box.dtype.itemsize
        buffer = as_bytes(box.contiguous()).numpy().data
        for row in range(len(box)):
            _write_bytes(file, first + row * pitch, buffer[row * width : (row + 1) * width])
    else:
        step = prod(shape[1:]) * box.dtype.itemsize
        for index in range(len(box)):
            write_region(
                file, offset + (starts[0] + index) * step, shape[1:], starts[1:], box[index]
            )


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes as a view (N,) uint8."""
    return tensor.reshape(-1).view(torch.uint8)


_TORCH_DTYPES = {
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
_DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


class SafetensorsFile:
    """An open safetensors file; `tensors` has the place of each tensor by its name.

    Raises:
        UserError: the file is damaged; it names the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file, self.tensors = open_safetensors(path)

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def read(self, name: str, starts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return a rectangle of a tensor in its stored dtype.

        Args:
            name: the tensor's name.
            starts: first index along each dimension.
            sizes: the shape of the rectangle."""
        tensor = self.tensors[name]
        return read_region(
            self.file, tensor.offset, tensor.shape, _TORCH_DTYPES[tensor.dtype], starts, sizes
        )


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a planned file.

    Attributes:
        shape: its shape.
        dtype: the dtype in which it is stored.
        offset: the first byte of its values in the file."""

    shape: Shape
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values in its stored dtype, without the file's header."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file before it exists.

    Attributes:
        header: the bytes before the values.
        tensors: its tensors by name, in order.
        num_bytes: the size of the file."""

    header: bytes
    tensors: dict[str, PlannedTensor]
    num_bytes: int


def stored_tensors(
    hf_config: HFConfig, dtype: torch.dtype, *, with_mtp: bool, names: Collection[str] | None = None
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return name -> (shape, dtype on disk) of the tensors of an export.

    Args:
        hf_config: the model's `config.json`.
        dtype: the dtype of weights that have none of their own.
        with_mtp: whether the MTP layers are exported.
        names: the names of the only tensors to return; ValueError for unknown ones.
    """
    tensors = {
        name: (shape, dtype if stored_dtype == "any" else torch.float32)
        for name, (shape, stored_dtype) in published_tensors(
            {**hf_config, "dtype": "any"}, with_mtp
        ).items()
    }
    if names is None:
        return tensors
    if unknown_names := sorted(set(names) - tensors.keys()):
        raise ValueError(f"the model has no tensor {', '.join(unknown_names)}")
    return {name: stored_dtype for name, stored_dtype in tensors.items() if name in set(names)}


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
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    planned_tensors = {
        name: PlannedTensor(*tensors[name], len(header) + starts[name]) for name, _ in order
    }
    return FilePlan(header, planned_tensors, len(header) + end)
