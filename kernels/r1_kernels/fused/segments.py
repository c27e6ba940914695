"""Sums over packed sequences: one program sums one sequence, in one order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 floats per thread, in loads of 4 bytes, because a sequence may start at any element; adjacent
# threads load adjacent elements, so that a warp's 128 bytes are still one line of memory.
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def segment_sums_kernel(
    values,  # (T,) any float
    cu_seqlens,  # (S + 1,) integers
    sums,  # out (S,) fp32
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    first = values + start
    running = tl.zeros((BLOCK,), tl.float32)
    length = (end - start).to(tl.int32)
    for offset in range(0, length, BLOCK):
        token = offset + tl.arange(0, BLOCK)
        running += tl.load(first + token, mask=token < length, other=0.0).to(tl.float32)
    tl.store(sums + sequence, tl.sum(running, 0))


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum (T,) values of S packed sequences with borders (S + 1,) → (S,) fp32."""
    values = values.contiguous()
    sums = torch.empty(len(cu_seqlens) - 1, dtype=torch.float32, device=values.device)
    if len(sums):
        with torch.cuda.device_of(values):
            segment_sums_kernel[(len(sums),)](
                values, cu_seqlens, sums, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
            )
    return sums
