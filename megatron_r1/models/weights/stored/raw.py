"""Reads and writes rectangles of tensors in files, without mapping the files.

A mapped page counts as this process's memory, and a converter touches every page of a file; with
reads into a buffer, its memory stays at the size of the buffer. And a mapped page is written back
whole: on a network file system, whose hosts do not see each other's pages, it overwrites what
another host has written next to it."""

import os
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

STRIPE_BYTES = 16 << 20


def read_box(
    file: int,
    at: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    starts: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """Return tensor[starts[0] : starts[0] + sizes[0], …], of shape `sizes`, of the contiguous
    tensor at offset `at`, which has `shape` and `dtype`.

    file: a file descriptor. Only the rows of the rectangle are read; where it has only some of the
    columns, in stripes of STRIPE_BYTES. Raises EOFError when the file is too short."""
    out = torch.empty(tuple(sizes), dtype=dtype)
    if not out.numel():
        return out
    if tuple(sizes[1:]) == tuple(shape[1:]):
        row = prod(shape[1:]) * dtype.itemsize
        read_into(file, at + starts[0] * row if starts else at, out)
    elif len(shape) == 2:
        rows = max(1, STRIPE_BYTES // (shape[1] * dtype.itemsize))
        for first in range(0, sizes[0], rows):
            count = min(rows, sizes[0] - first)
            box = (starts[0] + first, 0), (count, shape[1])
            stripe = read_box(file, at, shape, dtype, *box)
            out[first : first + count] = stripe[:, starts[1] : starts[1] + sizes[1]]
    else:
        step = prod(shape[1:]) * dtype.itemsize
        for index in range(sizes[0]):
            inner = at + (starts[0] + index) * step
            out[index] = read_box(file, inner, shape[1:], dtype, starts[1:], sizes[1:])
    return out


def read_into(file: int, at: int, out: Tensor) -> None:
    """Fill the contiguous `out` from offset `at`; EOFError when the file is too short."""
    buffer = as_bytes(out).numpy().data
    while buffer:
        # One call reads 2 GiB at most (read(2)), and may read less.
        count = os.preadv(file, [buffer], at)
        if not count:
            raise EOFError(f"{len(buffer)} bytes are missing at offset {at}")
        buffer, at = buffer[count:], at + count


def write_at(file: int, at: int, values: Tensor) -> None:
    """Write all of a tensor, contiguously, at offset `at`."""
    _write_bytes(file, at, as_bytes(values.contiguous()).numpy().data)


def _write_bytes(file: int, at: int, buffer: memoryview) -> None:
    while buffer:
        count = os.pwrite(file, buffer, at)
        buffer, at = buffer[count:], at + count


def write_box(file: int, at: int, shape: Sequence[int], starts: Sequence[int], box: Tensor) -> None:
    """Write `box` as tensor[starts[0] : starts[0] + len(box), …] of the tensor of `read_box`: its
    own bytes and no others, run by run where it has only some of the columns."""
    if not box.numel():
        return
    if tuple(box.shape[1:]) == tuple(shape[1:]):
        row = prod(shape[1:]) * box.dtype.itemsize
        write_at(file, at + starts[0] * row if starts else at, box)
    elif len(shape) == 2:
        pitch, width = shape[1] * box.dtype.itemsize, box.shape[1] * box.dtype.itemsize
        first = at + starts[0] * pitch + starts[1] * box.dtype.itemsize
        buffer = as_bytes(box.contiguous()).numpy().data
        for row in range(len(box)):
            _write_bytes(file, first + row * pitch, buffer[row * width : (row + 1) * width])
    else:
        step = prod(shape[1:]) * box.dtype.itemsize
        for index in range(len(box)):
            write_box(file, at + (starts[0] + index) * step, shape[1:], starts[1:], box[index])


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes as a view (N,) uint8."""
    return tensor.reshape(-1).view(torch.uint8)
