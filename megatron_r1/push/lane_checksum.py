"""A checksum of rows of words, computed in machine code that is compiled on first use.

`LaneChecksum` copies and sums in one pass over memory. In the copy's own loop the sum costs
nothing, because the loop waits for memory. The stores bypass the cache: this core does not read
them, and their cache lines need not be fetched first. A push with plain matrices takes 0.08 s with
this loop and 0.14 s with XXH3 and a copy by chunks (0.42 GB on 2 cores; docs/learned.md). llvmlite,
a dependency of vLLM, compiles the loop for the host's widest vectors in 20 ms."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
import xxhash

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
        """Do `read(source)` and target.copy_(source), where it `can_copy`.

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


def is_whole_stripes(row_bytes: int) -> bool:
    """Return whether a row gives every lane the same number of words."""
    return row_bytes > 0 and row_bytes % STRIPE_BYTES == 0


def can_copy(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Return whether the loop can copy between tensors (height, width): without conversion, and
    with a target whose rows are aligned for stores past the cache."""
    return (
        target.shape == source.shape
        and target.dtype == source.dtype
        and not (target.is_cuda or source.is_cuda)
        and target.stride(1) == source.stride(1) == 1
        and is_whole_stripes(target.shape[1] * target.itemsize)
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
