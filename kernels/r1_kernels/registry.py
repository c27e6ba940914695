"""Every primitive, and the choice of its backend. `examples.py` has the launches of each."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from r1_kernels.policy_terms import PolicySettings, PolicyTerms, TokenTensors
from r1_kernels.sampling_mask import KeptIds
from r1_kernels.vocabulary import RowUpstream, VocabShard

Block = tuple[int, int]
"""(rows, columns)"""


class Kernel(NamedTuple):
    """A primitive: where its code is, and what README and the benches say about it."""

    name: str
    """The function in both of its files, and in `examples`."""
    stem: str
    """Its files are primitives/<stem>_triton.py and primitives/<stem>_torch.py."""
    computes: str
    """What it computes, for the table of README."""
    num_bytes: str
    """Bytes read → written by one launch, b being those of an input element."""
    measured_in: str = ""
    """The table of `tools/bench kernels` that includes it; without one it gets its own."""


KERNELS = (
    Kernel(
        name="row_statistics",
        stem="softmax",
        computes="of each row of logits: largest, Σ eˣ, Σ x eˣ, the target's logit",
        num_bytes="b per logit, 8 per row → 16 per row",
        measured_in="token_logprobs",
    ),
    Kernel(
        name="logits_gradient",
        stem="softmax",
        computes="the gradient of the logits, over them if wanted",
        num_bytes="b per logit, 20 per row (28 with an entropy gradient) → 2 or 4 per logit",
        measured_in="token_logprobs",
    ),
    Kernel(
        name="kept_statistics",
        stem="kept",
        computes="`row_statistics` of the tokens that a sampler kept",
        num_bytes="4 + b per kept id, 24 per row → 16 per row",
    ),
    Kernel(
        name="kept_gradient",
        stem="kept",
        computes="the gradient of the kept tokens' logits",
        num_bytes="4 + b per kept id, 36 per row (44 with an entropy gradient) → 4 per kept id",
    ),
    Kernel(
        name="kept_scatter",
        stem="kept",
        computes="that gradient in rows that are 0 elsewhere",
        num_bytes="8 per kept id, 16 per row → 2 or 4 per logit",
    ),
    Kernel(
        name="policy_terms",
        stem="policy",
        computes="loss, its derivatives, ratio, clip, KL, importance weight",
        num_bytes="16 to 28 per token (4 to 7 floats) → 24 per token, 4 per 512 tokens",
        measured_in="policy_loss",
    ),
    Kernel(
        name="segment_sums",
        stem="policy",
        computes="sums over packed sequences",
        num_bytes="4 per token, two borders per sequence → 4 per sequence",
    ),
    Kernel(
        name="quantize_blocks",
        stem="blockwise",
        computes="FP8 e4m3 codes and a scale per 128×128 or 1×128 block",
        num_bytes="b per element → 1 per element, 4 per block",
        measured_in="quantize_blockwise",
    ),
    Kernel(
        name="dequantize_blocks",
        stem="blockwise",
        computes="codes times the scale of their block",
        num_bytes="1 per element, 4 per block → 2 or 4 per element",
        measured_in="dequantize_blockwise",
    ),
)


class Primitives(NamedTuple):
    """The functions of KERNELS, of one backend; the arguments are described in the Triton files."""

    row_statistics: Callable[[Tensor, Tensor, VocabShard, float], Tensor]
    logits_gradient: Callable[[Tensor, Tensor, VocabShard, float, RowUpstream, Tensor], Tensor]
    kept_statistics: Callable[[Tensor, Tensor, VocabShard, float, KeptIds], Tensor]
    kept_gradient: Callable[[Tensor, Tensor, VocabShard, float, RowUpstream, KeptIds], Tensor]
    kept_scatter: Callable[[Tensor, VocabShard, KeptIds, Tensor], Tensor]
    policy_terms: Callable[[TokenTensors, PolicySettings], PolicyTerms]
    segment_sums: Callable[[Tensor, Tensor], Tensor]
    quantize_blocks: Callable[[Tensor, Block], tuple[Tensor, Tensor]]
    dequantize_blocks: Callable[[Tensor, Tensor, Block, torch.dtype], Tensor]


def choose_primitives(tensor: Tensor, backend: str | None = None) -> Primitives:
    """Return the primitives for `tensor`; None: Triton for CUDA tensors (not fp64), else plain.

    Raises:
        ValueError: an unknown name; Triton on a CPU tensor (allowed in tests by
            TRITON_INTERPRET=1); or Triton is not installed.
    """
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
    return load_primitives(backend)


@cache
def load_primitives(backend: str) -> Primitives:
    """Return the primitives of backend "triton" or "torch"."""
    # Imported here: the Triton files need triton, which a machine without a GPU may lack.
    files = {k.name: f"r1_kernels.primitives.{k.stem}_{backend}" for k in KERNELS}
    return Primitives(
        **{name: getattr(importlib.import_module(file), name) for name, file in files.items()}
    )
