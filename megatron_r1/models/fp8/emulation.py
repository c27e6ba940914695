"""Makes Megatron's linear layers compute their products in emulated FP8 (`product`)."""

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.fp8.product import fp8_linear
from megatron_r1.models.fp8.recipes import Recipe
from megatron_r1.models.layers import ReplicatedLinear
from megatron_r1.models.policy_model import LMHead

LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


def emulate(model: torch.nn.Module, recipe: Recipe) -> None:
    """Make every linear layer of `model` but the head compute as `recipe` does.

    Megatron's linear layers, and our ReplicatedLinear, compute their product in the method
    `_forward_impl`; only that one is replaced, so sharding, communication and parameters are
    unchanged. Embedding, head, router, norms and attention stay in high precision, as in
    DeepSeek-V3 (section 3.3.1)."""
    for module in model.modules():
        if isinstance(module, LINEAR) and not isinstance(module, LMHead):
            linear: Any = module
            linear._forward_impl = partial(_forward_impl, recipe)


def _forward_impl(
    recipe: Recipe,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gradient_accumulation_fusion: bool = False,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Compute what Megatron's linear_with_grad_accumulation_and_async_allreduce (layers.py) does.

    input: (s, b, in), under sequence parallelism this rank's part of s; weight: (out, in) -> (s, b,
    out)."""
    assert not gradient_accumulation_fusion and not grad_output_buffer, "CUDA only: not emulated"
    if sequence_parallel:
        # Over the tensor group, before quantizing: tiles along the tokens are then those of a
        # single process.
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = fp8_linear(input, weight, recipe)
    return output if bias is None else output + bias
