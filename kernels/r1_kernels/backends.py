"""Choose the primitives of a call: Triton kernels (`fused`) or plain PyTorch (`plain`).

The two packages have the same functions with the same signatures. The algorithms - chunking,
vocabulary parallelism, autograd - are written once, over either."""

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

PACKAGES = {"triton": "r1_kernels.fused", "torch": "r1_kernels.plain"}


def choose(tensor: Tensor, backend: str | None = None) -> ModuleType:
    """Return the primitives for `tensor`; None: Triton for CUDA tensors (not fp64), else plain.

    Raises ValueError for an unknown name, for Triton on a CPU tensor (allowed in tests by
    TRITON_INTERPRET=1) and where Triton is not installed."""
    if backend is None:
        backend = "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "torch"
    if backend not in PACKAGES:
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
    return importlib.import_module(PACKAGES[backend])
