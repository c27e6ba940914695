"""The three matrix products of a linear head, accumulated and kept in fp32 (fp64 for fp64)."""

import torch
from torch import Tensor

REDUCED = (torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which results in `dtype` are accumulated."""
    return torch.promote_types(dtype, torch.float32)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute out = a @ b, with `out` of `wide(a.dtype)`.

    cuBLAS writes the fp32 sums of bf16 products unrounded; a bf16 logit of 20 would be off by up
    to 0.06. The CPU has no such product and rounds."""
    if a.dtype not in REDUCED:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out += a @ b, with `out` of `wide(a.dtype)`; on a GPU never rounded to a.dtype."""
    if a.dtype in REDUCED and a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.dtype in REDUCED:
        out += a @ b
    else:
        out.addmm_(a, b)
