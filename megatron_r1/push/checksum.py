"""One 64-bit checksum per chunk, of its elements row after row, whatever the strides.

On a CPU: `LaneChecksum` where rows are whole stripes of it, otherwise XXH3, a chunk at a time while
its bytes are in the cache. On a GPU, where either would copy all bytes to the host: `weighted_sum`.
They detect accidental errors of wires, memory and indices, not an adversary.

`LaneChecksum` copies and sums in one pass over memory, in machine code that is compiled on first
use. In the copy's own loop the sum costs nothing, because the loop waits for memory. The stores
bypass the cache: this core does not read them, and their cache lines need not be fetched first. A
push with plain matrices takes 0.08 s with this loop and 0.14 s with XXH3 and a copy by chunks (0.42
GB on 2 cores; docs/learned.md). llvmlite, a dependency of vLLM, compiles the loop for the
host's widest vectors in 20 ms."""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
import xxhash

CACHE_BYTES = 1 << 19
"""Fits into a core's cache; chunks of 256 KiB or 1 MiB are no faster."""
PASS_BYTES = 1 << 22
"""Copied per call of the compiled loop, and so per progress report; 1 MiB is 10% slower."""
SUMMED_ELEMENTS = 1 << 22
"""Elements summed at once, as int64."""
MIXER = 0x1E3779B97F4A7C15
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""size in bytes -> the dtype as which values of that size are summed and copied"""
NUM_LANES = 16
STRIPE_BYTES = 8 * NUM_LANES
"""One 64-bit word per lane; rows that are whole stripes can be summed."""
ROTATION = 29
"""Bits, to the left; odd, so that 64 words pass before two have the same weight."""
ALIGNMENT_BYTES = 64
"""Bytes; of rows that are written with stores past the cache."""

_LOOP = """
define void @NAME(ptr %to, i64 %to_pitch, ptr %from, i64 %from_pitch, i64 %height, i64 %row_bytes,
                  ptr %plain_at, ptr %running_at) {
before:
  %plain0 = load <16 x i64>, ptr %plain_at, align 8
  %running0 = load <16 x i64>, ptr %running_at, align 8
  br label %row
row:
  %y = phi i64 [0, %before], [%y_next, %row_end]
  %plain_row = phi <16 x i64> [%plain0, %before], [%plain_next, %row_end]
  %running_row = phi <16 x i64> [%running0, %before], [%running_next, %row_end]
  %from_offset = mul i64 %y, %from_pitch
  %from_row = getelementptr i8, ptr %from, i64 %from_offset
  %to_offset = mul i64 %y, %to_pitch
  %to_row = getelementptr i8, ptr %to, i64 %to_offset
  br label %stripe
stripe:
  %x = phi i64 [0, %row], [%x_next, %stripe]
  %plain = phi <16 x i64> [%plain_row, %row], [%plain_next, %stripe]
  %running = phi <16 x i64> [%running_row, %row], [%running_next, %stripe]
  %from_here = getelementptr i8, ptr %from_row, i64 %x
  %words = load <16 x i64>, ptr %from_here, align 1
  STORE
  %plain_next = add <16 x i64> %plain, %words
  %rotated = call <16 x i64> @llvm.fshl.v16i64(<16 x i64> %running, <16 x i64> %running,
                                              <16 x i64> ROTATION)
  %running_next = add <16 x i64> %rotated, %plain_next
  %x_next = add i64 %x, 128
  %more = icmp ult i64 %x_next, %row_bytes
  br i1 %more, label %stripe, label %row_end
row_end:
  %y_next = add i64 %y, 1
  %more_rows = icmp ult i64 %y_next, %height
  br i1 %more_rows, label %row, label %after
after:
  store <16 x i64> %plain_next, ptr %plain_at, align 8
  store <16 x i64> %running_next, ptr %running_at, align 8
  ret void
}
"""
_STORE = """%to_here = getelementptr i8, ptr %to_row, i64 %x
  store <16 x i64> %words, ptr %to_here, align 64, !nontemporal !0"""


def _checksum_loop(name: str, store: str) -> str:
    bits = f"<{', '.join([f'i64 {ROTATION}'] * NUM_LANES)}>"
    return _LOOP.replace("NAME", name).replace("ROTATION", bits).replace("STORE", store)


LOOPS = f"""
declare <16 x i64> @llvm.fshl.v16i64(<16 x i64>, <16 x i64>, <16 x i64>)
{_checksum_loop("copy", _STORE)}
{_checksum_loop("read", "")}
define void @memory_fence() {{
  fence seq_cst
  ret void
}}
!0 = !{{i32 1}}
"""
"""LLVM IR, for any machine; 16 and 128 in it are `NUM_LANES` and `STRIPE_BYTES`."""
_engines: list[llvm.ExecutionEngine] = []
"""Own the compiled code. All are kept: two threads may compile it at once, and both use theirs."""


class LaneChecksum:
    """The checksum of rows of words, in order.

    Per lane, for each of its words w,

        plain += w,  running = rotate_left(running, ROTATION) + plain,  modulo 2^64

    and XXH3 of both sums of all lanes. A single wrong word shows in `plain`; errors that cancel out
    there (swapped words, two lost highest bits) show in `running`."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, NUM_LANES), np.uint64)

    def read(self, rows: torch.Tensor) -> None:
        """Add rows (height, width) in host memory, each of whole stripes."""
        if len(rows):
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            _compiled_loops().read(None, 0, *_memory_extent(rows), *self._sum_addresses)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Do `read(source)` and target.copy_(source), where it `_can_copy`.

        Another process sees the bytes only after a `memory_fence`."""
        if len(source):
            _compiled_loops().copy(
                *_memory_extent(target)[:2], *_memory_extent(source), *self._sum_addresses
            )

    def digest(self) -> int:
        """Return the 64 bits that stand for all lanes' sums (XXH3)."""
        return xxhash.xxh3_64_intdigest(self._sums.data)

    @property
    def _sum_addresses(self) -> tuple[int, int]:
        return self._sums.ctypes.data, self._sums.ctypes.data + STRIPE_BYTES


def memory_fence() -> None:
    """Order this thread's earlier reads and writes of shared memory before its later ones."""
    _compiled_loops().memory_fence()


def _is_whole_stripes(row_bytes: int) -> bool:
    """Return whether a row gives every lane the same number of words."""
    return row_bytes > 0 and row_bytes % STRIPE_BYTES == 0


def _can_copy(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Return whether the loop can copy between tensors (height, width): without conversion, and
    with a target whose rows are aligned for stores past the cache."""
    return (
        target.shape == source.shape
        and target.dtype == source.dtype
        and not (target.is_cuda or source.is_cuda)
        and target.stride(1) == source.stride(1) == 1
        and _is_whole_stripes(target.shape[1] * target.itemsize)
        and target.data_ptr() % ALIGNMENT_BYTES == _row_pitch(target) % ALIGNMENT_BYTES == 0
    )


def _memory_extent(values: torch.Tensor) -> tuple[int, int, int, int]:
    """Return address, pitch in bytes, height, and width in bytes."""
    height, width = values.shape
    return values.data_ptr(), _row_pitch(values), height, width * values.itemsize


def _row_pitch(values: torch.Tensor) -> int:
    return values.stride(0) * values.itemsize


class _Compiled(NamedTuple):
    copy: Callable[..., None]
    read: Callable[..., None]
    memory_fence: Callable[[], None]


@cache
def _compiled_loops() -> _Compiled:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # not known for this machine; the processor's name implies most of them
        features = ""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(LOOPS), machine)
    engine.finalize_object()
    _engines.append(engine)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loop = ctypes.CFUNCTYPE(None, pointer, size, pointer, size, size, size, pointer, pointer)
    return _Compiled(
        loop(engine.get_function_address("copy")),
        loop(engine.get_function_address("read")),
        ctypes.CFUNCTYPE(None)(engine.get_function_address("memory_fence")),
    )


class RowsChecksum:
    """The checksum of rows of `row_bytes` in host memory, given in order."""

    def __init__(self, row_bytes: int):
        self._lanes = LaneChecksum() if _is_whole_stripes(row_bytes) else None
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
    if _can_copy(target, source):
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
