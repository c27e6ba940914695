"""One 64-bit checksum per delivery, of its elements row after row, whatever the strides: `LaneSums`
where its rows are whole stripes of them, else XXH3, taken a chunk at a time while its bytes are in
the cache; on a GPU, where either would have to bring every byte to the host, sums of another kind.

They answer for what wires, memory and indices do by accident, not for an adversary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import xxhash

from megatron_r1.weight_sync.receive.table import by_rows
from megatron_r1.weight_sync.verify import lanes

CHUNK_BYTES = 1 << 19
"""Fits into a core's cache."""
PASS_BYTES = 1 << 22
"""In one pass of copying and summing: how far apart a receiver hears of what is there."""
SUMMED_ELEMENTS = 1 << 22
"""At once, as int64."""
MIXER = 0x1E3779B97F4A7C15
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RowsChecksum:
    """Of rows of so many bytes in the host's memory, in order."""

    def __init__(self, row_bytes: int):
        self._lanes = lanes.LaneSums() if lanes.fit(row_bytes) else None
        self._hashed = xxhash.xxh3_64()

    def update(self, rows: torch.Tensor) -> None:
        """rows: (height, width), the next ones."""
        if self._lanes is not None:
            self._lanes.read(rows)
            return
        words = _words(rows)
        for chunk in _chunks(rows, CHUNK_BYTES):
            self._hashed.update(np.ascontiguousarray(words[chunk]))

    def digest(self) -> int:
        return (self._hashed if self._lanes is None else self._lanes).intdigest()


class RunningChecksum:
    """Of a (height, width) tensor's elements while its rows arrive."""

    def __init__(self, values: torch.Tensor):
        self._values, self._row = values, 0
        self._rows = RowsChecksum(values.shape[1] * values.itemsize)

    def reach(self, row: int) -> None:
        """The rows before this one are there, and will not change."""
        if not self._values.is_cuda and row > self._row:
            self._rows.update(self._values[self._row : row])
            self._row = row

    def digest(self) -> int:
        """All rows are there."""
        if self._values.is_cuda:
            return sums(self._values)
        self.reach(len(self._values))
        return self._rows.digest()


def checksum(values: torch.Tensor) -> int:
    """Of a (height, width) tensor's elements."""
    return RunningChecksum(values).digest()


def copy_with_checksum(
    target: torch.Tensor, source: torch.Tensor, written: Callable[[int], None] | None = None
) -> int:
    """target.copy_(source), both (height, width); the checksum of what `target` must hold then.
    Returns when this process sees it written; for others, see `lanes.order`. written: told now and
    then how many rows are, never that all are."""
    if target.is_cuda:
        target.copy_(source)
        return sums(target)
    if lanes.can_copy(target, source):
        summed = lanes.LaneSums()
        for rows in _told(target, PASS_BYTES, written):
            summed.copy(target[rows], source[rows])
        return summed.intdigest()
    is_converted = target.dtype != source.dtype or source.is_cuda
    running = RunningChecksum(target if is_converted else source)
    for rows in _told(target, CHUNK_BYTES, written):
        if is_converted:
            target[rows].copy_(source[rows])
        running.reach(rows.stop)
        if not is_converted:
            # After its checksum, and so from the cache. By NumPy, in this thread: PyTorch would
            # wake others for every chunk.
            np.copyto(_words(target[rows]), _words(source[rows]))
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


def _chunks(values: torch.Tensor, most: int) -> Iterator[slice]:
    """Rows of a (height, width) tensor, `most` bytes of them at once."""
    height, width = values.shape
    return by_rows(height, width * values.itemsize, most)


def _told(
    values: torch.Tensor, most: int, written: Callable[[int], None] | None
) -> Iterator[slice]:
    """`_chunks`; between them `written` is told how far they are."""
    for rows in _chunks(values, most):
        if written and rows.start:
            written(rows.start)
        yield rows
