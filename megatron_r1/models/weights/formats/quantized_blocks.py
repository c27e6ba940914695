"""Weights in blocks with a scale each: DeepSeek's FP8, and MXFP4, which is only read.

FP8 has blocks of 128 x 128, whose layout is in `published_layout`. gpt-oss's experts are published
in MXFP4.

An MXFP4 weight (experts, columns, rows) is stored transposed, in blocks of 32 numbers of a row:
`_blocks` (experts, rows, columns / 32, 16) uint8, two FP4 codes (E2M1) in a byte, the low half
first; and `_scales` (experts, rows, columns / 32) uint8, the exponent of each block's power of two
plus 127 (OCP Microscaling Formats, v1.0). All products are bf16 numbers."""

import torch
from r1_kernels import dequantize_blockwise, quantize_blockwise
from torch import Tensor

from megatron_r1.models.weights.formats.published_layout import FP8_BLOCK_SIZE, scale_shape
from megatron_r1.models.weights.splits import Shape


def quantize_fp8(
    x: Tensor, known_scales: Tensor | None = None, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize whole blocks of 128 x 128. A block's scale is amax / 448.

    Args:
        x: (M, N), fp32 or bf16.
        known_scales: scales (⌈M/128⌉, ⌈N/128⌉) that the weights may have been dequantized with: a
            block that equals FP8 numbers times its known scale, in fp32 or rounded to bf16, keeps
            that scale, and with it every bit. Without it FP8 → bf16 → FP8 would not be the
            identity: bf16 rounding changes a number by at most 2^-8 of itself and half the distance
            between two e4m3 numbers is at least 2^-5 of them, so the codes are recovered, but the
            scale is not (amax has been rounded too). A block that training has changed gets a new
            scale.
        power_of_two: round scales up to a power of two, for checkpoints whose quantization_config
            has scale_fmt "ue8m0".

    Returns:
        (q, scale_inv): float8_e4m3fn (M, N) and fp32 (⌈M/128⌉, ⌈N/128⌉).
    """
    x = x.float()
    q, scale = quantize_blockwise(x)
    if power_of_two:
        scale = _next_power_of_two(scale)
        q = _fp8_codes(x, scale)
    if known_scales is None:
        return q, scale
    candidate = _fp8_codes(x, known_scales)
    exact_values = dequantize_blockwise(candidate, known_scales, dtype=torch.float32)
    is_exact_block = _whole_blocks(exact_values == x) | _whole_blocks(
        exact_values.bfloat16().float() == x
    )
    is_exact = spread_scales(is_exact_block, x.shape)
    q = torch.where(is_exact, candidate.view(torch.uint8), q.view(torch.uint8))
    return q.view(torch.float8_e4m3fn), torch.where(is_exact_block, known_scales, scale)


def _fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return (x * spread_scales(inverse, x.shape)).to(torch.float8_e4m3fn)


def spread_scales(per_block: Tensor, shape: torch.Size) -> Tensor:
    """Expand (⌈M/128⌉, ⌈N/128⌉) to (M, N): every element gets its block's entry."""
    tall_scales = per_block.repeat_interleave(FP8_BLOCK_SIZE, 0)[: shape[0]]
    return tall_scales.repeat_interleave(FP8_BLOCK_SIZE, 1)[:, : shape[1]]


def _whole_blocks(equal: Tensor) -> Tensor:
    """Reduce (M, N) bool to (⌈M/128⌉, ⌈N/128⌉): whether all of a block is True."""
    rows, columns = equal.shape
    padded_flags = torch.nn.functional.pad(
        equal, (0, -columns % FP8_BLOCK_SIZE, 0, -rows % FP8_BLOCK_SIZE), value=True
    )
    blocks_down, blocks_across = scale_shape(equal.shape)
    return (
        padded_flags.view(blocks_down, FP8_BLOCK_SIZE, blocks_across, FP8_BLOCK_SIZE).all(3).all(1)
    )


def _next_power_of_two(scale: Tensor) -> Tensor:
    # The mantissa is in [0.5, 1): at 0.5 the scale is a power of two itself.
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = torch.tensor([*_POSITIVE, *(-x for x in _POSITIVE)], dtype=torch.bfloat16)
_BIAS = 127


def blocks_name(name: str) -> str:
    """Return the name of the tensor that has the MXFP4 codes of weight `name`, two to a byte."""
    return name + "_blocks"


def scales_name(name: str) -> str:
    """Return the name of the tensor that has the MXFP4 exponents of weight `name`, one byte for a
    block."""
    return name + "_scales"


def stored_shapes(shape: Shape) -> dict[str, Shape]:
    """Return name ending -> shape of the two tensors that store a weight of `shape`; {} for one
    that has no whole blocks."""
    if len(shape) != 3 or shape[1] % 32:
        return {}
    experts, columns, rows = shape
    scales = (experts, rows, columns // 32)
    return {"_blocks": (*scales, 16), "_scales": scales}


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weight of one expert, (rows, columns) bf16, from its codes (rows, columns / 32,
    16) and exponents (rows, columns / 32)."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(2)
    values = torch.ldexp(_VALUES[codes.int()], scales.int()[..., None] - _BIAS)
    return values.flatten(1)
