"""Linear layers whose three products compute as an FP8 recipe does, on any device.

Megatron's own linear layers, and our ReplicatedLinear, make their product in a method of its own,
`_forward_impl`; that one is replaced, so that sharding, communication and parameters stay theirs.
What is no such product is not touched: embedding, head, router, norms and attention stay in high
precision, as in DeepSeek-V3 (section 3.3.1)."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_r1.models.fp8.product import fp8_linear
from megatron_r1.models.fp8.recipes import Recipe
from megatron_r1.models.layers import ReplicatedLinear
from megatron_r1.models.policy_model import LMHead

LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


def emulate(model: torch.nn.Module, recipe: Recipe) -> None:
    """Have every linear layer of `model` but the head compute as `recipe` does."""
    for module in model.modules():
        if isinstance(module, LINEAR) and not isinstance(module, LMHead):
            module._forward_impl = partial(_forward_impl, recipe)


def _forward_impl(
    recipe: Recipe,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gradient_accumulation_fusion: bool = False,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
    grad_output_buffer=None,
    wgrad_deferral_limit=None,
    tp_group=None,
) -> Tensor:
    """What Megatron's layers ask of a product (tensor_parallel/layers.py,
    linear_with_grad_accumulation_and_async_allreduce), its names included."""
    assert not gradient_accumulation_fusion and not grad_output_buffer, "CUDA only: not emulated"
    if sequence_parallel:
        # Gathered before it is quantised: tiles along the tokens are those of a single process.
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = fp8_linear(input, weight, recipe)
    return output if bias is None else output + bias
