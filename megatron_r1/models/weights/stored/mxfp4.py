"""MXFP4, in which gpt-oss's experts are published, and which is only read.

A weight (experts, columns, rows) is stored transposed, in blocks of 32 numbers of a row:
`_blocks` (experts, rows, columns / 32, 16) uint8, two FP4 codes (E2M1) in a byte, the low half
first; and `_scales` (experts, rows, columns / 32) uint8, the exponent of each block's power of two
plus 127 (OCP Microscaling Formats, v1.0). All products are bf16 numbers."""

import torch
from torch import Tensor

from megatron_r1.models.weights.table import Shape

_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_VALUES = torch.tensor([*_POSITIVE, *(-x for x in _POSITIVE)], dtype=torch.bfloat16)
_BIAS = 127


def blocks_name(name: str) -> str:
    """Return the name of the codes of `name`."""
    return name + "_blocks"


def scales_name(name: str) -> str:
    """Return the name of the exponents of `name`."""
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
