"""The adapter of one Megatron linear layer on one rank."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn.functional import linear

from megatron_r1.models.gradients import mark_like
from megatron_r1.models.weights.adapters.table import A, B
from megatron_r1.models.weights.layout import LayoutEntry


class Adapter(torch.nn.Module):
    """The product scale B A for the weights that a layer has on this rank.

    a: (blocks x rank, in), a block per Hugging Face layer in the weight. b: (out, rank); a row
    multiplies its own layer's block. Both have the dtype and device of `weight`; a is not
    initialized, b is 0. group: the tensor ranks that share the weight. Under sequence parallelism
    (`by_sequence`) each of these ranks has a part of the tokens, of routed experts all tokens."""

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
        of_a, of_b = entries
        self.a = torch.nn.Parameter(
            torch.empty(of_a.shape, dtype=weight.dtype, device=weight.device)
        )
        self.b = torch.nn.Parameter(
            torch.zeros(of_b.shape, dtype=weight.dtype, device=weight.device)
        )
        for factor, entry in ((self.a, of_a), (self.b, of_b)):
            mark_like(factor, weight, counts=not entry.replicated or group.rank() == 0)
        blocks = _blocks(of_a, of_b)
        self._is_plain = blocks.shape[1] == 1 and bool(blocks.all())
        self.register_buffer("_blocks", blocks.to(self.b), persistent=False)
        # A rank's gradient of a replicated factor is then a part of the whole: of other tokens, or
        # through other features.
        self._sums_gradients = by_sequence or of_a.expert
        self._between = None if of_a.expert else _between(of_a, of_b, by_sequence)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, (..., out), for its input, (..., in)."""
        a, b = self.a, self._wide()
        if self._sums_gradients:
            share = partial(copy_to_tensor_model_parallel_region, group=self.group)
            a = share(a) if self.entries[0].replicated else a
            b = share(b) if self.entries[1].replicated else b
        hidden = linear(x, a)
        if self._between is not None:
            hidden = self._between(hidden, group=self.group)
        return linear(hidden * self.scale, b)

    @torch.no_grad()
    def merged(self, weight: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return weight[rows, columns] with the adapter's product, which is computed in fp32."""
        b, a = self._wide()[rows].float(), self.a[:, columns].float()
        return weight[rows, columns].float().addmm(b, a, alpha=self.scale).to(weight.dtype)

    def _wide(self) -> Tensor:
        """Return B as one matrix (out, blocks x rank), with zeros outside each row's block."""
        if self._is_plain:
            return self.b
        return (self._blocks[:, :, None] * self.b[:, None]).flatten(1)


def _blocks(of_a: LayoutEntry, of_b: LayoutEntry) -> Tensor:
    """Return (out, blocks), 1 where a row of B belongs to a block of A."""
    names = [piece.hf_name.removesuffix(A) for piece in of_a.pieces]
    mask = torch.zeros(of_b.shape[0], len(names))
    for piece in of_b.pieces:
        end = piece.local_start + piece.length
        mask[piece.local_start : end, names.index(piece.hf_name.removesuffix(B))] = 1
    return mask


def _between(
    of_a: LayoutEntry, of_b: LayoutEntry, by_sequence: bool
) -> Callable[..., Tensor] | None:
    """Return the communication between the factors A and B: what the layer does with its input or
    output of all features, done with the `rank` features of a token, or None if both are whole."""
    if of_a.replicated and of_b.replicated:
        return None
    if of_a.replicated:  # column-parallel
        if by_sequence:
            return partial(gather_from_sequence_parallel_region, tensor_parallel_output_grad=True)
        return copy_to_tensor_model_parallel_region
    if by_sequence:
        return reduce_scatter_to_sequence_parallel_region
    return reduce_from_tensor_model_parallel_region
