"""One 64-bit checksum per delivery: XXH3, taken while its bytes are still in the cache; on a GPU,
where XXH3 would have to bring every byte to the host, sums.

They answer for what wires, memory and indices do by accident, not for an adversary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import xxhash

CHUNK_BYTES = 1 << 19
"""Fits into a core's cache: a chunk is hashed right after it was copied."""
SUMMED_ELEMENTS = 1 << 22
"""At once, as int64."""
MIXER = 0x1E3779B97F4A7C15
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: torch.Tensor) -> int:
    """Of a (height, width) tensor's elements, row after row, whatever its strides."""
    if values.is_cuda:
        return sums(values)
    hashed = xxhash.xxh3_64()
    for start, end in _chunks(values):
        hashed.update(as_bytes(values[start:end].contiguous()))
    return hashed.intdigest()


def copy_with_checksum(target: torch.Tensor, source: torch.Tensor) -> int:
    """target.copy_(source), both (height, width); the checksum of what was written. Returns when
    it is."""
    if target.is_cuda:
        target.copy_(source)
        return sums(target)
    hashed = xxhash.xxh3_64()
    for start, end in _chunks(target):
        chunk = target[start:end]
        _copy(chunk, source[start:end])
        hashed.update(as_bytes(chunk.contiguous()))
    return hashed.intdigest()


def sums(values: torch.Tensor) -> int:
    """Of a (height, width) tensor on any device: sum of w[i] plus sum of (2i + 1) w[i] times a
    constant, modulo 2^64, of its elements' bits w in row order. An odd factor has an inverse, so
    any one element that differs shows, and so do two that changed places."""
    bits = _BITS[values.element_size()]
    height, width = values.shape
    rows = max(1, SUMMED_ELEMENTS // width)
    plain = weighted = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, height, rows):
        words = values[start : start + rows].reshape(-1).view(bits).long()
        first = 2 * start * width + 1
        factors = torch.arange(first, first + 2 * len(words), 2, device=values.device)
        plain, weighted = plain + words.sum(), weighted + (words * factors).sum()
    return int(plain + weighted * MIXER) % 2**64


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
