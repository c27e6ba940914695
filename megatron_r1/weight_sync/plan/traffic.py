"""Counts the bytes of a slice on the wire."""

from __future__ import annotations

from collections.abc import Callable

from megatron_r1.weight_sync.plan.tensors import Region
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantized

CountBytes = Callable[[str, str | None, Region], int]
"""(HF name, the tensor's own dtype or None, region) -> bytes on the wire."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def plain_bytes(dtype: str) -> CountBytes:
    """Count every tensor in `dtype`, except those that keep their own."""
    return lambda name, own_dtype, region: region.num_elements * _WIDTH[own_dtype or dtype]


def fp8_bytes(name: str, own_dtype: str | None, region: Region) -> int:
    """Count projections as float8 with an fp32 scale per 128 x 128 block, the rest in bf16."""
    if not is_quantized(name):
        return region.num_elements * _WIDTH[own_dtype or "bfloat16"]
    height, width = region.bottom - region.top, region.right - region.left
    return region.num_elements + 4 * -(-height // BLOCK) * -(-width // BLOCK)
