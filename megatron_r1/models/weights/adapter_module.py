"""The low-rank adapter (LoRA) of one layer: y = W x + alpha / rank B A x. It has the factors, their
product and the merged weight (`Adapter`), and the hooks that add the product to a layer's output.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from megatron_r1.models.gradients import copy_gradient_attributes
from megatron_r1.models.weights.adapter_table import A, B
from megatron_r1.models.weights.layout import LayoutEntry


class Adapter(torch.nn.Module):
    """The product scale B A for the weights that a layer has on this rank.

    Both matrices have the dtype and device of `weight`; a is not initialized, b is 0.

    Attributes:
        a: (blocks x rank, in), a block per Hugging Face layer in the weight.
        b: (out, rank); a row multiplies its own layer's block.
        group: the tensor ranks that share the weight. Under sequence parallelism (`by_sequence`)
            each of these ranks has a part of the tokens, of routed experts all tokens."""

    _blocks: Tensor

    def __init__(
        self,
        entries: tuple[LayoutEntry, LayoutEntry],
        weight: Tensor,
        scale: float,
        group: torch.distributed.ProcessGroup,
        by_sequence: bool,
    ):
        super().__init__()
        self.entries, self.scale, self.group = entries, scale, group
        a_entry, b_entry = entries
        self.a = torch.nn.Parameter(
            torch.empty(a_entry.shape, dtype=weight.dtype, device=weight.device)
        )
        self.b = torch.nn.Parameter(
            torch.zeros(b_entry.shape, dtype=weight.dtype, device=weight.device)
        )
        for factor, entry in ((self.a, a_entry), (self.b, b_entry)):
            copy_gradient_attributes(
                factor, weight, counts=not entry.is_replicated or group.rank() == 0
            )
        blocks = _block_mask(a_entry, b_entry)
        self._is_plain = blocks.shape[1] == 1 and bool(blocks.all())
        self.register_buffer("_blocks", blocks.to(self.b), persistent=False)
        # A rank's gradient of a replicated factor is then a part of the whole: of other tokens, or
        # through other features.
        self._sums_gradients = by_sequence or a_entry.is_expert
        self._communicate = (
            None if a_entry.is_expert else _factor_communication(a_entry, b_entry, by_sequence)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, (..., out), for its input, (..., in)."""
        a, b = self.a, self._as_matrix()
        if self._sums_gradients:
            share = partial(copy_to_tensor_model_parallel_region, group=self.group)
            a = share(a) if self.entries[0].is_replicated else a
            b = share(b) if self.entries[1].is_replicated else b
        hidden = linear(x, a)
        if self._communicate is not None:
            hidden = self._communicate(hidden, group=self.group)
        return linear(hidden * self.scale, b)

    @torch.no_grad()
    def merge(self, weight: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return weight[rows, columns] with the adapter's product, which is computed in fp32.

        Args:
            weight: (out, in), the frozen weight.
            rows: which rows.
            columns: which columns."""
        b, a = self._as_matrix()[rows].float(), self.a[:, columns].float()
        return weight[rows, columns].float().addmm(b, a, alpha=self.scale).to(weight.dtype)

    def _as_matrix(self) -> Tensor:
        """Return B as one matrix (out, blocks x rank), with zeros outside each row's block."""
        if self._is_plain:
            return self.b
        return (self._blocks[:, :, None] * self.b[:, None]).flatten(1)


def _block_mask(a_entry: LayoutEntry, b_entry: LayoutEntry) -> Tensor:
    """Return (out, blocks), 1 where a row of B belongs to a block of A."""
    names = [piece.hf_name.removesuffix(A) for piece in a_entry.pieces]
    mask = torch.zeros(b_entry.shape[0], len(names))
    for piece in b_entry.pieces:
        end = piece.local_start + piece.length
        mask[piece.local_start : end, names.index(piece.hf_name.removesuffix(B))] = 1
    return mask


def _factor_communication(
    a_entry: LayoutEntry, b_entry: LayoutEntry, by_sequence: bool
) -> Callable[..., Tensor] | None:
    """Return the communication between the factors A and B, or None if both are whole.

    It is what the layer does with its input or output of all features, done with the `rank`
    features of a token."""
    if a_entry.is_replicated and b_entry.is_replicated:
        return None
    if a_entry.is_replicated:  # column-parallel
        if by_sequence:
            return partial(gather_from_sequence_parallel_region, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region
    if by_sequence:
        return reduce_scatter_to_sequence_parallel_region
    return reduce_from_tensor_model_parallel_region


def add_product(layer: Any, inputs: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the output of a linear layer, (values, bias), with its adapter's product added to the
    values.

    Args:
        layer: the linear layer.
        inputs: its arguments; the first has shape (..., in).
        out: its output, (values, bias)."""
    x = inputs[0]
    if (norm := getattr(layer, "layer_norm_weight", None)) is not None:
        # Transformer Engine has the norm before a layer in it.
        x = rms_norm(x, tuple(norm.shape), norm, layer.eps)
    return out[0] + layer.lora(x), *out[1:]


def add_products(layer: Any, inputs: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the output of a layer of all experts, (values, bias), with the adapters' products
    added to the values.

    Args:
        layer: the layer of all experts.
        inputs: tokens by expert, and each expert's number of tokens.
        out: the layer's own output, (values, bias)."""
    x, counts = inputs[:2]
    shares = zip(layer.lora, x.split(counts), strict=True)
    parts = [adapter(tokens) for adapter, tokens in shares]
    return out[0] + torch.cat(parts), *out[1:]
