"""One 64-bit checksum (XXH3) per delivery, taken while its bytes are still in the cache.

It answers for what wires, memory and indices do by accident, not for an adversary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import xxhash

CHUNK_BYTES = 1 << 19
"""Fits into a core's cache: a chunk is hashed right after it was copied."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: torch.Tensor) -> int:
    """Of a (height, width) tensor's elements, row after row, whatever its strides."""
    hashed = xxhash.xxh3_64()
    for start, end in _chunks(values):
        hashed.update(as_bytes(values[start:end].contiguous()))
    return hashed.intdigest()


def copy_with_checksum(target: torch.Tensor, source: torch.Tensor) -> int:
    """target.copy_(source), both (height, width) on the host; the checksum of what was written."""
    hashed = xxhash.xxh3_64()
    for start, end in _chunks(target):
        chunk = target[start:end]
        _copy(chunk, source[start:end])
        hashed.update(as_bytes(chunk.contiguous()))
    return hashed.intdigest()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.dtype == source.dtype and source.device == target.device:
        # By NumPy, in this thread: PyTorch would wake others for every chunk.
        bits = _BITS[target.element_size()]
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source)


def as_bytes(values: torch.Tensor):
    """A buffer of a contiguous host tensor's bytes, of any dtype."""
    return values.reshape(-1).view(torch.uint8).numpy()


def _chunks(values: torch.Tensor) -> Iterator[tuple[int, int]]:
    height, width = values.shape
    rows = max(1, CHUNK_BYTES // (width * values.element_size()))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)
