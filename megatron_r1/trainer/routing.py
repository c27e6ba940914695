"""Experts that the engine has chosen, on their way from a replica's samples to the rank that
replays them (routing replay).

The leader of a replica has the routing of all its samples: every MoE layer of every token. Another
rank needs its own layers, of the tokens that its routers process, which the lengths of the samples
and the rank's place decide. So the leader cuts a part for each rank, and all parts together are as
many bytes as the samples have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.models.routing_replay import RecordedRouting
from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.trainer.replica import Replica
from megatron_r1.trainer.token_split import (
    PackedLayout,
    TokenSplit,
    packed_layout,
    routed_positions,
)
from megatron_r1.trainer.training_sample import Sample

Microbatches = Sequence[Sequence[Sample]]
"""The micro-batches of all mini-batches, one after the other."""
SENT_AHEAD = 2
"""Parts that the leader has cut while earlier ones are on their way."""


@dataclass(frozen=True)
class RoutingShard:
    """The shard of the routing that a rank replays.

    Attributes:
        shape: the sizes of the whole model's routing.
        layers: the rank's MoE layers, as indices into shape.moe_layers."""

    shape: RoutingShape
    layers: list[int]

    @property
    def dtype(self) -> np.dtype:
        """Of the experts' numbers: those below 32,768 look the same in int16, which torch can
        index; in uint16 it cannot."""
        return np.dtype("u1" if self.shape.index_bytes == 1 else "<i2")


def pack_routing(
    samples: Sequence[Sample], split: TokenSplit, shard: RoutingShard
) -> RecordedRouting:
    """Return a rank's shard of the routing of the packed micro-batch `samples`, on the CPU.

    Indices stay in the 1 or 2 bytes they arrived in.

    Args:
        samples: the micro-batch.
        split: whose tokens.
        shard: whose layers.

    Raises:
        ValueError: for routing that does not fit its sample."""
    layout = packed_layout(samples, split)
    return _pack_at(samples, layout, routed_positions(layout.cu_seqlens, split), shard)


def _pack_at(
    samples: Sequence[Sample], layout: PackedLayout, local_positions: Tensor, shard: RoutingShard
) -> RecordedRouting:
    """Return what `pack_routing` does of the tokens at the positions `local_positions`."""
    local_routing = _local_routing(
        _concatenated_routing([samples], [layout], shard), local_positions
    )
    return _fill_unread_tokens(local_routing, samples, layout, local_positions, shard.shape)


def _fill_unread_tokens(
    recorded: RecordedRouting,
    samples: Sequence[Sample],
    layout: PackedLayout,
    local_positions: Tensor,
    shape: RoutingShape,
) -> RecordedRouting:
    """Return the choices with `local_counts` if the engine has chosen for every token of the rank
    that it was fed. The last token of each sample and padding, whose outputs nothing reads, then
    get all experts in turn, in place."""
    is_fed = torch.zeros(int(layout.cu_seqlens[-1]), dtype=torch.bool)
    for sample, start in zip(samples, layout.starts, strict=True):
        is_fed[start : start + len(sample) - 1] = True
    if (is_fed[local_positions] & ~recorded.is_recorded).any():
        return recorded
    experts, is_unread = recorded.experts, ~recorded.is_recorded
    in_turn = (
        local_positions[is_unread][:, None] * shape.topk + torch.arange(shape.topk)
    ) % shape.num_experts
    experts[is_unread] = in_turn[:, None].to(experts.dtype)
    counts = torch.zeros(experts.shape[1], shape.num_experts, dtype=torch.int64)
    layer_experts = experts.transpose(0, 1).flatten(1).long()
    counts.scatter_add_(1, layer_experts, torch.ones_like(layer_experts))
    return recorded._replace(local_counts=counts.numpy())


def _concatenated_routing(
    microbatches: Microbatches, layouts: Sequence[PackedLayout], shard: RoutingShard
) -> RecordedRouting:
    """Return the shard's layers of all tokens of these micro-batches, one after the other."""
    total = sum(int(layout.cu_seqlens[-1]) for layout in layouts)
    experts = np.zeros((total, len(shard.layers), shard.shape.topk), shard.dtype)
    is_recorded, layers, first = np.zeros(total, bool), _layer_index(shard.layers), 0
    for samples, layout in zip(microbatches, layouts, strict=True):
        for sample, start in zip(samples, layout.starts, strict=True):
            rows = _decode_rows(sample, shard.shape)
            end = first + start + len(sample) - 1  # the last token was never fed to the engine
            experts[end - len(rows) : end] = rows[:, layers]
            is_recorded[end - len(rows) : end] = True
        first += int(layout.cu_seqlens[-1])
    return RecordedRouting(torch.from_numpy(experts), torch.from_numpy(is_recorded))


def _all_routed_positions(layouts: Sequence[PackedLayout], split: TokenSplit) -> Tensor:
    """Return the positions in `_concatenated_routing` of the tokens that a rank routes."""
    local_positions, first = [torch.empty(0, dtype=torch.int64)], 0
    for layout in layouts:
        local_positions.append(first + routed_positions(layout.cu_seqlens, split))
        first += int(layout.cu_seqlens[-1])
    return torch.cat(local_positions)


def _local_routing(routing: RecordedRouting, local_positions: Tensor) -> RecordedRouting:
    return RecordedRouting(
        routing.experts.index_select(0, local_positions),
        routing.is_recorded.index_select(0, local_positions),
    )


def _layer_index(layers: list[int]) -> list[int] | slice:
    """Return an index of these layers; a slice where they follow each other, as NumPy copies runs
    of bytes then."""
    if layers and layers == list(range(layers[0], layers[0] + len(layers))):
        return slice(layers[0], layers[0] + len(layers))
    return layers


def _decode_rows(sample: Sample, shape: RoutingShape) -> np.ndarray:
    """Return the routing [rows, moe layers, topk] of a sample's tokens before the last."""
    if len(sample.routing) % shape.token_bytes:
        raise ValueError(
            f"{len(sample.routing)} bytes of routing are no multiple of {shape.token_bytes}: "
            f"{len(shape.moe_layers)} layers x {shape.topk} experts x {shape.index_bytes}"
        )
    flat_indices = np.frombuffer(sample.routing, f"<u{shape.index_bytes}")
    rows = flat_indices.reshape(-1, len(shape.moe_layers), shape.topk)
    if len(rows) >= len(sample) and len(rows):
        raise ValueError(f"{len(rows)} rows of routing for a sample of {len(sample)} tokens")
    return rows


class RoutingScatter:
    """Sends each rank of a replica its part of the routing.

    Args:
        replica: the ranks; all make this together.
        split: this rank's tokens.
        shard: this rank's layers."""

    def __init__(self, replica: Replica, split: TokenSplit, shard: RoutingShard):
        self._replica, self._split, self._shard = replica, split, shard
        self._ranks: list[tuple[TokenSplit, list[int]]] = replica.all_gather((split, shard.layers))
        """Of each member its tokens and its layers."""
        self.sent_bytes = 0
        """Bytes that this rank has sent to others."""

    def scatter(self, microbatches: Microbatches) -> list[RecordedRouting]:
        """Return this rank's part of each micro-batch, on the CPU.

        Args:
            microbatches: with their routing on the leader; the others' have none.

        Raises:
            ValueError: on the leader, for routing that does not fit its sample."""
        layouts = [packed_layout(samples, self._split) for samples in microbatches]
        local_positions = [routed_positions(layout.cu_seqlens, self._split) for layout in layouts]
        if not self._replica.is_leader:
            received_routings = self._receive_routing(
                [len(positions) for positions in local_positions]
            )
            return [
                _fill_unread_tokens(routing, samples, layout, positions, self._shard.shape)
                for routing, samples, layout, positions in zip(
                    received_routings, microbatches, layouts, local_positions, strict=True
                )
            ]
        unfinished_sends: list[tuple[dist.Work, Tensor]] = []
        # By layers: the ranks that share a pipeline stage get parts of the same rows.
        order = sorted(range(1, len(self._ranks)), key=lambda member: self._ranks[member][1])
        for member, part in zip(
            order, self._member_shards(microbatches, layouts, order), strict=True
        ):
            self.sent_bytes += len(part)
            unfinished_sends += [(work, part) for work in self._replica.send(part, member)]
            while len(unfinished_sends) > SENT_AHEAD:
                work, _ = unfinished_sends.pop(0)
                work.wait()
        for work, _ in unfinished_sends:
            work.wait()
        return [
            _pack_at(samples, layout, positions, self._shard)
            for samples, layout, positions in zip(
                microbatches, layouts, local_positions, strict=True
            )
        ]

    def _member_shards(
        self, microbatches: Microbatches, layouts: Sequence[PackedLayout], members: Iterable[int]
    ) -> Iterator[Tensor]:
        """Yield the bytes for each member: the experts of its tokens of all micro-batches, then
        which tokens have some."""
        layers: list[int] | None = None
        local_positions = cache(lambda split: _all_routed_positions(layouts, split))
        for member in members:
            split, own_layers = self._ranks[member]
            if own_layers != layers:
                layers = own_layers
                shard = RoutingShard(self._shard.shape, own_layers)
                routing = _concatenated_routing(microbatches, layouts, shard)
            local_routing = _local_routing(routing, local_positions(split))
            parts = (local_routing.experts, local_routing.is_recorded)
            yield torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in parts])

    def _receive_routing(self, counts: list[int]) -> list[RecordedRouting]:
        """Receive the parts of micro-batches of which this rank routes `counts` tokens each."""
        total = sum(counts)
        shape = (total, len(self._shard.layers), self._shard.shape.topk)
        width = len(self._shard.layers) * self._shard.shape.topk * self._shard.dtype.itemsize
        joined_bytes = self._replica.receive(total * (width + 1))
        experts_type = torch.uint8 if self._shard.dtype.itemsize == 1 else torch.int16
        experts = joined_bytes[: total * width].view(experts_type).view(shape)
        is_recorded = joined_bytes[total * width :].bool()
        parts = zip(experts.split(counts), is_recorded.split(counts), strict=True)
        return [RecordedRouting(*part) for part in parts]
