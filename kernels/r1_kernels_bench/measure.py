"""Seconds and peak extra memory of one call, on a CPU or a GPU."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
