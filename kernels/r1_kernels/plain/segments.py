"""Sums over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from r1_kernels.gemm import wide


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum (T,) values of S packed sequences with borders (S + 1,) → (S,), at least fp32."""
    values = values.to(wide(values.dtype))
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0)
