"""The rate of matrix products on a rank's device."""

import time

import torch

from megatron_r1 import platform

SECONDS = {"cuda": 2.0, "cpu": 0.3}
"""A GPU that runs too hot lowers its clock within seconds."""
MIN_REPEATS = 3
SIZES = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}


def product_rate() -> float:
    """Return the FLOP per second of square products: the median of a GPU's, whose clock is to
    hold; the best of a CPU's, which other processes share."""
    device = platform.device()
    size, dtype = SIZES[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(left, right)  # not timed: libraries load
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS[device.type]
    while time.perf_counter() < end or len(seconds) < MIN_REPEATS:
        platform.synchronize()
        start = time.perf_counter()
        torch.matmul(left, right)
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    chosen = sorted(seconds)[len(seconds) // 2 if device.type == "cuda" else 0]
    return 2 * size**3 / chosen
