"""One 64-bit checksum per delivery: XXH3, taken while its bytes are still in the cache; on a GPU,
where XXH3 would have to bring every byte to the host, sums.

They answer for what wires, memory and indices do by accident, not for an adversary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import xxhash

from megatron_r1.landing.table import by_rows

CHUNK_BYTES = 1 << 19
"""Fits into a core's cache: a chunk is hashed right after it was copied."""
SUMMED_ELEMENTS = 1 << 22
"""At once, as int64."""
MIXER = 0x1E3779B97F4A7C15
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RunningChecksum:
    """Of a (height, width) tensor's elements, row after row, whatever its strides, while its rows
    arrive."""

    def __init__(self, values: torch.Tensor):
        self._values, self._row = values, 0
        self._hashed = xxhash.xxh3_64()
        if not values.is_cuda:
            self._words = _words(values)

    def reach(self, row: int) -> None:
        """The rows before this one are there, and will not change."""
        if self._values.is_cuda:
            return
        new = self._words[self._row : row]
        for rows in _chunks(new):
            self._hashed.update(np.ascontiguousarray(new[rows]))
        self._row += len(new)

    def digest(self) -> int:
        """All rows are there."""
        if self._values.is_cuda:
            return sums(self._values)
        self.reach(len(self._values))
        return self._hashed.intdigest()


def checksum(values: torch.Tensor) -> int:
    """Of a (height, width) tensor's elements, row after row, whatever its strides."""
    return RunningChecksum(values).digest()


def copy_with_checksum(
    target: torch.Tensor, source: torch.Tensor, written: Callable[[int], None] | None = None
) -> int:
    """target.copy_(source), both (height, width); the checksum of what `target` must hold then.
    Returns when it is written. written: told now and then how many rows are, never that all are."""
    if target.is_cuda:
        target.copy_(source)
        return sums(target)
    is_converted = target.dtype != source.dtype or source.is_cuda
    running = RunningChecksum(target if is_converted else source)
    into, read = _words(target), None if is_converted else _words(source)
    for rows in _chunks(into):
        if written and rows.start:
            written(rows.start)
        if read is None:
            target[rows].copy_(source[rows])
        running.reach(rows.stop)
        if read is not None:
            # After its checksum, and so from the cache. By NumPy, in this thread: PyTorch would
            # wake others for every chunk.
            np.copyto(into[rows], read[rows])
    return running.digest()


def sums(values: torch.Tensor) -> int:
    """Of a (height, width) tensor on any device: sum of w[i] plus sum of (2i + 1) w[i] times a
    constant, modulo 2^64, of its elements' bits w in row order. An odd factor has an inverse, so
    any one element that differs shows, and so do two that changed places."""
    bits = _BITS[values.element_size()]
    height, width = values.shape
    plain = weighted = torch.zeros((), dtype=torch.int64, device=values.device)
    for rows in by_rows(height, width, SUMMED_ELEMENTS):
        words = values[rows].reshape(-1).view(bits).long()
        first = 2 * rows.start * width + 1
        factors = torch.arange(first, first + 2 * len(words), 2, device=values.device)
        plain, weighted = plain + words.sum(), weighted + (words * factors).sum()
    return int(plain + weighted * MIXER) % 2**64


def _words(values: torch.Tensor) -> np.ndarray:
    """The same memory as integers, which NumPy knows of every size."""
    return values.detach().view(_BITS[values.element_size()]).numpy()


def as_bytes(values: torch.Tensor):
    """A buffer of a contiguous host tensor's bytes, of any dtype."""
    return values.reshape(-1).view(torch.uint8).numpy()


def _chunks(words: np.ndarray) -> Iterator[slice]:
    height, width = words.shape
    return by_rows(height, width * words.itemsize, CHUNK_BYTES)
