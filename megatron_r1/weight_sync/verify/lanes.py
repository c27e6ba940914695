"""Copying and checking in one pass over memory, in machine code made when first needed.

A checksum taken before or after a copy costs a core what it takes to read the bytes from its cache
once more; in the same loop it costs nothing, for the loop waits for memory. Stores go past the
cache: nobody on this core reads them, and the lines they fall on need not be fetched first.
llvmlite, which vLLM brings, turns the loop below into the host's widest vectors.
"""

from __future__ import annotations

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
"""A row is stripes of as many 64-bit words as there are lanes."""
TURN = 29
"""Bits, to the left; odd, so that it takes 64 words until one counts as another did."""
ALIGNMENT = 64
"""Of rows that are stored to past the cache."""

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
  %turned = call <16 x i64> @llvm.fshl.v16i64(<16 x i64> %running, <16 x i64> %running,
                                              <16 x i64> TURN)
  %running_next = add <16 x i64> %turned, %plain_next
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


def _loop(name: str, store: str) -> str:
    turn = f"<{', '.join([f'i64 {TURN}'] * NUM_LANES)}>"
    return _LOOP.replace("NAME", name).replace("TURN", turn).replace("STORE", store)


LOOPS = f"""
declare <16 x i64> @llvm.fshl.v16i64(<16 x i64>, <16 x i64>, <16 x i64>)
{_loop("copy", _STORE)}
{_loop("read", "")}
define void @order() {{
  fence seq_cst
  ret void
}}
!0 = !{{i32 1}}
"""
"""LLVM's language, for any machine; 16 and 128 in it are `NUM_LANES` and `STRIPE_BYTES`."""
_owners: list[llvm.ExecutionEngine] = []
"""Of the code, which may run as long as this process: two threads may be the first at once."""


class LaneSums:
    """Checksum of rows of words, in their order. Per lane, for each of its words w,

        plain += w,  running = (running turned by `TURN` bits) + plain,  modulo 2^64

    and XXH3 of all lanes' two. Any one word that differs shows in the first; what cancels out there
    (words that changed places, two that lost their highest bit), in the second.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((2, NUM_LANES), np.uint64)

    def read(self, rows: torch.Tensor) -> None:
        """rows: (height, width) in the host's memory, each of which `fit`s."""
        if len(rows):
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            _compiled().read(None, 0, *_of(rows), *self._at)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """`read`, and target.copy_(source), where it `can_copy`.

        Another process may read of it before it sees the bytes, but for an `order` between them."""
        if len(source):
            _compiled().copy(*_of(target)[:2], *_of(source), *self._at)

    def intdigest(self) -> int:
        return xxhash.xxh3_64_intdigest(self._sums)

    @property
    def _at(self) -> tuple[int, int]:
        return self._sums.ctypes.data, self._sums.ctypes.data + STRIPE_BYTES


def order() -> None:
    """What this thread wrote to and read from shared memory so far comes before what follows."""
    _compiled().order()


def fit(row_bytes: int) -> bool:
    """Whether rows are whole stripes."""
    return row_bytes > 0 and row_bytes % STRIPE_BYTES == 0


def can_copy(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the loop can, between (height, width) tensors: the bytes stay what they are, and the
    target's rows lie where they can be stored past the cache."""
    return (
        target.shape == source.shape
        and target.dtype == source.dtype
        and not (target.is_cuda or source.is_cuda)
        and target.stride(1) == source.stride(1) == 1
        and fit(target.shape[1] * target.itemsize)
        and target.data_ptr() % ALIGNMENT == _pitch(target) % ALIGNMENT == 0
    )


def _of(values: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, pitch, height and width, in bytes but the height."""
    height, width = values.shape
    return values.data_ptr(), _pitch(values), height, width * values.itemsize


def _pitch(values: torch.Tensor) -> int:
    return values.stride(0) * values.itemsize


class _Compiled(NamedTuple):
    copy: Callable[..., None]
    read: Callable[..., None]
    order: Callable[[], None]


@cache
def _compiled() -> _Compiled:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know this machine's; the processor's name says most
        features = ""
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(LOOPS), machine)
    engine.finalize_object()
    _owners.append(engine)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loop = ctypes.CFUNCTYPE(None, pointer, size, pointer, size, size, size, pointer, pointer)
    return _Compiled(
        loop(engine.get_function_address("copy")),
        loop(engine.get_function_address("read")),
        ctypes.CFUNCTYPE(None)(engine.get_function_address("order")),
    )
