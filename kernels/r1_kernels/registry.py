"""Every primitive by name, and the choice of its backend. `examples.py` has their launches."""

import importlib
import importlib.util
import os
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

STEMS = {
    "row_statistics": "softmax",
    "logits_gradient": "softmax",
    "policy_terms": "policy",
    "segment_sums": "policy",
    "quantize_blocks": "blockwise",
    "dequantize_blocks": "blockwise",
}
"""Name of a primitive -> its files, primitives/<stem>_triton.py and primitives/<stem>_torch.py."""


def choose(tensor: Tensor, backend: str | None = None) -> SimpleNamespace:
    """Return the primitives for `tensor`; None: Triton for CUDA tensors (not fp64), else plain.

    Raises ValueError for an unknown name, for Triton on a CPU tensor (allowed in tests by
    TRITON_INTERPRET=1) and where Triton is not installed."""
    if backend is None:
        backend = "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend is {backend!r}: use "triton", "torch" or None')
    if backend == "triton":
        if tensor.dtype == torch.float64:
            raise ValueError('backend="triton" computes in fp32, got fp64: use backend="torch"')
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'backend="triton" needs CUDA tensors, got one on {tensor.device}: move it, or use '
                'backend="torch"'
            )
        if importlib.util.find_spec("triton") is None:
            raise ValueError('triton is not installed: pip install triton, or use backend="torch"')
    return primitives(backend)


@cache
def primitives(backend: str) -> SimpleNamespace:
    """Return the functions of STEMS by name, of backend "triton" or "torch"."""
    modules = {name: f"r1_kernels.primitives.{stem}_{backend}" for name, stem in STEMS.items()}
    return SimpleNamespace(
        **{name: getattr(importlib.import_module(m), name) for name, m in modules.items()}
    )
