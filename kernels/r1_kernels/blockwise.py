"""FP8 e4m3 with one scale per block, in the format of DeepSeek-V3's checkpoints.

For each block X of a matrix (DeepSeek-V3, arXiv 2412.19437 section 3.3: 128x128 of a weight, 1x128
of an activation; blocks at the edges may be smaller):

    scale_inv = max(amax |X|, 1e-4) / 448                  448 is the largest e4m3 number
    q         = e4m3(X · (1 / scale_inv))                  rounded to nearest even
    X'        = q · scale_inv                              at most one rounding to `dtype`

all in fp32 with IEEE rounding, as DeepGEMM's per_block_cast_to_fp8 and per_token_cast_to_fp8 with
fp32 scales define it; checkpoints call `scale_inv` weight_scale_inv. NaN or infinity in a block
makes the whole block NaN (with infinity, the finite elements become 0 · inf when dequantized). Both
backends give the same bits (a NaN's sign aside). DeepGEMM's own functions give them on the CPU; on
CUDA tensors PyTorch replaces their `/ 448.0` by a multiplication with the reciprocal, and a scale
can differ in its last bit."""

from typing import Any

import torch
from torch import Tensor

from r1_kernels.arguments import check_same_device
from r1_kernels.registry import choose_primitives

BLOCKS = ((128, 128), (1, 128))
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def quantize_blockwise(
    x: Tensor, *, block: tuple[int, int] = (128, 128), backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize `x` block by block to q and scale_inv; without gradient.

    Args:
        x: (M, N) fp32, bf16 or fp16, either size may be 0; rows may have any stride, another layout
            is copied first.
        block: (128, 128), or (1, 128).
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        q, (M, N) float8_e4m3fn, and scale_inv, (ceil(M / block[0]), ceil(N / 128)) fp32, both
        contiguous. The module has the formula.

    Raises:
        ValueError: a shape, dtype, block or backend that is not supported."""
    block = _checked_block(block)
    _check_matrix("x", x)
    _check_dtype("x", x.dtype)
    return choose_primitives(x, backend).quantize_blocks(x, block)


@torch.no_grad()
def dequantize_blockwise(
    q: Tensor,
    scale_inv: Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """Return q · scale_inv, formed in fp32 and rounded once more to `dtype`; without gradient.

    Args:
        q: (M, N) float8_e4m3fn.
        scale_inv: (ceil(M / block[0]), ceil(N / 128)) fp32.
        block: (128, 128), or (1, 128), as q was quantized.
        dtype: fp32, bf16 or fp16.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        (M, N) of `dtype`, contiguous.

    Raises:
        ValueError: a shape, dtype, device, block or backend that does not fit, by name."""
    block = _checked_block(block)
    _check_matrix("q", q)
    _check_dtype("dtype", dtype)
    if q.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"q must be torch.float8_e4m3fn, got {q.dtype}: .view(torch.float8_e4m3fn) reads "
            "uint8 codes"
        )
    expected_shape = tuple(-(-size // along) for size, along in zip(q.shape, block, strict=True))
    if scale_inv.dtype != torch.float32 or tuple(scale_inv.shape) != expected_shape:
        raise ValueError(
            f"scale_inv must be {expected_shape} torch.float32 for q {tuple(q.shape)} in blocks of "
            f"{block}, got {tuple(scale_inv.shape)} {scale_inv.dtype}"
        )
    check_same_device(q=q, scale_inv=scale_inv)
    return choose_primitives(q, backend).dequantize_blocks(q, scale_inv, block, dtype)


def _checked_block(block: Any) -> tuple[int, int]:
    if not isinstance(block, tuple | list) or tuple(block) not in BLOCKS:
        raise ValueError(
            f"block is {block}: use (128, 128) for weights or (1, 128) for activations"
        )
    return tuple(block)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be a matrix (M, N), got {tuple(tensor.shape)}: reshape it or go over "
            "its matrices"
        )


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in INPUT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
