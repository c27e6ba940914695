"""The dtypes in which an operation computes: those of its inputs, also within `torch.autocast`.

The three matrix products of a linear head are accumulated and kept in fp32 (fp64 for fp64)."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return `function` with autocast off while it runs.

    Autocast would run single products in bf16 or fp16 whose results are written into fp32 tensors,
    which torch refuses. For an output layer in reduced precision, hidden and weight are cast by the
    caller."""

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


REDUCED_DTYPES = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which results in `dtype` are accumulated."""
    return torch.promote_types(dtype, torch.float32)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out = a @ b.

    cuBLAS writes the fp32 sums of bf16 products unrounded; a bf16 logit of 20 would be off by up
    to 0.06. The CPU has no such product and rounds.

    Args:
        out: (M, N) of `accumulation_dtype(a.dtype)`.
        a: (M, K).
        b: (K, N), of a's dtype."""
    if a.dtype not in REDUCED_DTYPES:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def accumulate_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out += a @ b; the product is not rounded to a's dtype.

    The CPU has no product of bf16 matrices with fp32 sums, and computes with fp32 copies.

    Args:
        out: (M, N) of `accumulation_dtype(a.dtype)`.
        a: (M, K).
        b: (K, N), of a's dtype."""
    if a.dtype in REDUCED_DTYPES and a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
