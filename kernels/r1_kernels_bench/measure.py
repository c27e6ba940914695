"""Seconds and peak extra memory of one call, and what a device can do at most: the rate of a matrix
product, or of a copy."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

L2_BYTES = 2**28  # several times the largest L2 cache (H200: 50 MB; B200: 126 MB)


class CallCost(NamedTuple):
    """One measurement of a call.

    Attributes:
        seconds: the time of the call.
        extra_bytes: None if it cannot be measured on this machine."""

    seconds: float
    extra_bytes: int | None


class CPUMeter:
    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)

    def __call__(self, call: Callable[[], Any]) -> CallCost:
        gc.collect()
        self._trim(0)
        bytes_before = self._reset_peak()
        started_at = time.perf_counter()
        results = call()  # kept, as its memory counts
        seconds = time.perf_counter() - started_at
        peak = None if bytes_before is None else _status_bytes("VmHWM")
        del results
        return CallCost(
            seconds, None if bytes_before is None or peak is None else max(0, peak - bytes_before)
        )

    def settle(self) -> None:
        gc.collect()

    @staticmethod
    def _reset_peak() -> int | None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or a container that forbids it
            return None
        return _status_bytes("VmRSS")


class CUDAMeter:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> CallCost:
        gc.collect()
        torch.cuda.synchronize(self._device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats(self._device)
        bytes_before = torch.cuda.memory_allocated(self._device)
        self._flush.zero_()
        start.record()
        results = call()
        end.record()
        torch.cuda.synchronize(self._device)
        del results
        extra_bytes = torch.cuda.max_memory_allocated(self._device) - bytes_before
        return CallCost(start.elapsed_time(end) / 1e3, extra_bytes)

    def settle(self) -> None:
        """Free memory that torch's allocator keeps but no tensor uses.

        Raises:
            RuntimeError: an earlier call broke the device's context.
        """
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def _status_bytes(field: str) -> int | None:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


TOKENS_AT_ONCE = 8_192  # logits of 65,536 tokens would not leave room for anything else
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}


@dataclass(frozen=True)
class Bound:
    """The device's own rate, measured in the same rounds as the implementations.

    `call` does `done` units of work; the kernel needs at least `needed` units. Kernels on hidden
    states are bounded by matrix products, the others by memory traffic.

    Attributes:
        name: the bound.
        unit: "FLOP" or "B".
        call: what is timed.
        done: units of one call.
        needed: units that the kernel needs."""

    name: str
    unit: str  # "FLOP" or "B"
    call: Callable[[], None]
    done: float
    needed: float


def matrix_bound(hidden: Tensor, weight: Tensor, tokens: int, products: int) -> Bound:
    """Return the bound of a kernel on hidden states: torch.mm alone, on `tokens` rows.

    On a GPU the logits and the weight's gradient are written in fp32, as by a kernel that rounds
    neither.

    Args:
        hidden: (T, H).
        weight: (V, H).
        tokens: the number of rows.
        products: 1, the logits; 3, also the gradients of hidden states and weight."""
    rows = hidden[:TOKENS_AT_ONCE]
    rounds = rows.is_cuda and rows.dtype != torch.float32
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm
    if rounds:
        product = partial(torch.mm, out_dtype=torch.float32)
    d_logits = rows.new_ones(len(rows), len(weight))

    def call() -> None:
        product(rows, weight.t())
        if products == 3:
            torch.mm(d_logits, weight)
            product(d_logits.t(), rows)

    flops = 2.0 * products * weight.numel()
    name = f"torch.mm, {'these three products' if products == 3 else 'this product'} alone"
    return Bound(name, "FLOP", call, flops * len(rows), flops * tokens)


def copy_bound(device: torch.device, needed_bytes: int) -> Bound:
    """A copy within the device's memory; each byte counts as read and as written."""
    num_bytes = COPIED_BYTES[device.type]

    def call() -> None:
        target.copy_(source)

    # Filled here, so that no page is first mapped while the call is timed.
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Bound("a copy within its memory", "B", call, 2.0 * num_bytes, float(needed_bytes))
