"""One 64-bit checksum per chunk, of its elements row after row, whatever the strides.

On a CPU: `LaneChecksum` where rows are whole stripes of it, otherwise XXH3, a chunk at a time while
its bytes are in the cache. On a GPU, where either would copy all bytes to the host: `weighted_sum`.
They detect accidental errors of wires, memory and indices, not an adversary."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import xxhash

from megatron_r1.push.lane_checksum import LaneChecksum, can_copy, is_whole_stripes

CACHE_BYTES = 1 << 19
"""Fits into a core's cache; chunks of 256 KiB or 1 MiB are no faster."""
PASS_BYTES = 1 << 22
"""Copied per call of the compiled loop, and so per progress report; 1 MiB is 10% slower."""
SUMMED_ELEMENTS = 1 << 22
"""Elements summed at once, as int64."""
MIXER = 0x1E3779B97F4A7C15
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""size in bytes -> the dtype as which values of that size are summed and copied"""


class RowsChecksum:
    """The checksum of rows of `row_bytes` in host memory, given in order."""

    def __init__(self, row_bytes: int):
        self._lanes = LaneChecksum() if is_whole_stripes(row_bytes) else None
        self._xxh3 = xxhash.xxh3_64()

    def update(self, rows: torch.Tensor) -> None:
        """Add the next rows (height, width)."""
        if self._lanes is not None:
            self._lanes.read(rows)
            return
        words = _integer_view(rows)
        for row_range in _row_ranges(rows, CACHE_BYTES):
            self._xxh3.update(np.ascontiguousarray(words[row_range]).data)

    def digest(self) -> int:
        """Return the checksum of all rows so far."""
        return self._xxh3.intdigest() if self._lanes is None else self._lanes.digest()

    def value(self, device: torch.device) -> torch.Tensor:
        """Return the checksum as an int64 scalar on `device`, its 64 bits as a signed number."""
        digest = self.digest()
        return torch.tensor(digest - 2**64 if digest >= 2**63 else digest, device=device)


class RowsWeightedSum:
    """The checksum of rows on their own device, used as `RowsChecksum`.

    Of the elements' bits w, in row order: sum(w[i]) + MIXER * sum((2i + 1) w[i]) modulo 2^64.

    An odd factor has an inverse, so any single wrong element shows, and so do two that are swapped.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | int = 0
        self._count = 0

    def update(self, rows: torch.Tensor) -> None:
        """Add the next rows (height, width)."""
        bits = INTEGERS[rows.element_size()]
        for row_range in _row_ranges(rows, SUMMED_ELEMENTS * rows.itemsize):
            words = rows[row_range].reshape(-1).view(bits).long()
            first = 2 * self._count + 1
            factors = torch.arange(first, first + 2 * len(words), 2, device=rows.device)
            self._sum = self._sum + words.sum() + MIXER * (words * factors).sum()
            self._count += len(words)

    def value(self, device: torch.device) -> torch.Tensor:
        """Return the checksum on its device, int64 (), without waiting for it."""
        return torch.as_tensor(self._sum, dtype=torch.int64, device=device)

    def digest(self) -> int:
        """Return the checksum of all rows so far, as an unsigned 64-bit number."""
        return int(self._sum) % 2**64


class RunningChecksum:
    """The checksum of a matrix, computed while its rows arrive.

    Args:
        values: the matrix (height, width).
        uses_weighted_sum: whether the checksum is the `weighted_sum`, as on a GPU."""

    def __init__(self, values: torch.Tensor, uses_weighted_sum: bool = False):
        self._values, self._row = values, 0
        self._rows = RowsChecksum(values.shape[1] * values.itemsize)
        self._is_weighted = uses_weighted_sum or values.is_cuda

    def update_to(self, row: int) -> None:
        """Add the rows before `row`, which will not change any more."""
        if not self._is_weighted and row > self._row:
            self._rows.update(self._values[self._row : row])
            self._row = row

    def digest(self) -> int:
        """Return the checksum of the whole chunk, reading what `update_to` has not."""
        if self._is_weighted:
            return weighted_sum(self._values)
        self.update_to(len(self._values))
        return self._rows.digest()


def tensor_checksum(values: torch.Tensor) -> int:
    """Return the checksum of a tensor (height, width)."""
    return RunningChecksum(values).digest()


def copy_with_checksum(
    target: torch.Tensor, source: torch.Tensor, report: Callable[[int], None] | None = None
) -> int:
    """Do target.copy_(source), and return the checksum that `target` must have.

    Args:
        target: the memory to write to (height, width).
        source: the values (height, width).
        report: called from time to time with the number of rows written, never with all of them.
            Other processes see the rows only after a `memory_fence`."""
    if target.is_cuda:
        target.copy_(source)
        return weighted_sum(target)
    if can_copy(target, source):
        lane_checksum = LaneChecksum()
        for rows in _row_ranges(target, PASS_BYTES, report):
            lane_checksum.copy(target[rows], source[rows])
        return lane_checksum.digest()
    is_converted = target.dtype != source.dtype or source.is_cuda
    running_checksum = RunningChecksum(target if is_converted else source)
    for rows in _row_ranges(target, CACHE_BYTES, report):
        if is_converted:
            target[rows].copy_(source[rows])
        running_checksum.update_to(rows.stop)
        if not is_converted:
            # After its checksum, and so from the cache. By NumPy, in this thread: PyTorch would
            # wake other threads for every chunk.
            np.copyto(_integer_view(target[rows]), _integer_view(source[rows]))
    return running_checksum.digest()


def weighted_sum(values: torch.Tensor) -> int:
    """Return the `RowsWeightedSum` of a tensor (height, width) on any device."""
    rows = RowsWeightedSum()
    rows.update(values)
    return rows.digest()


def _integer_view(values: torch.Tensor) -> np.ndarray:
    """Return the same memory as integers, since NumPy has no bfloat16 or float8."""
    return values.detach().view(INTEGERS[values.element_size()]).numpy()


def _row_ranges(
    values: torch.Tensor, num_bytes: int, report: Callable[[int], None] | None = None
) -> Iterator[slice]:
    """Yield all rows of a tensor (height, width), about `num_bytes` at once and at least one row.
    Between two yields, `report` is called with the number of rows done."""
    height, width = values.shape
    rows = max(1, num_bytes // (width * values.itemsize))
    for first in range(0, height, rows):
        if report and first:
            report(first)
        yield slice(first, min(first + rows, height))
