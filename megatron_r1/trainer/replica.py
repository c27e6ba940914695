"""The ranks of a model replica, whose first rank sends the others their samples."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_r1.models import platform
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.training_sample import Buffer

T = TypeVar("T")
BROADCAST_BYTES = 1 << 30
"""Bytes of one broadcast or send; a replica's share of long responses has gigabytes."""


class Replica:
    """The ranks of one model replica, which all work on the same samples; created on every rank
    together, after Megatron's grid.

    The controller sends a data-parallel share to the first rank of each replica only, which sends
    it on to the others: it travels over the controller's network once, however many ranks the
    replica has, and no rank sees another replica's samples."""

    def __init__(self, grid_position: GridPosition, timeout: timedelta | None = None):
        """Make the replica's process group.

        Args:
            grid_position: this rank's place in the grid.
            timeout: the time that the other ranks of the replica have to come to a broadcast; None
                for torch's."""
        local_data_rank = torch.tensor([grid_position.data_rank], device=platform.device())
        data_ranks = [torch.empty_like(local_data_rank) for _ in range(grid_position.world_size)]
        # Over all ranks: each needs the members of all replicas.
        dist.all_gather(data_ranks, local_data_rank)
        replicas: dict[int, list[int]] = {}
        for rank, data_rank in enumerate(data_ranks):
            replicas.setdefault(int(data_rank), []).append(rank)
        # Every rank creates every group. With use_local_synchronization a group's name is the count
        # of groups that its rank has made (torch 2.13, distributed_c10d.py:5467); ranks disagree on
        # it and hang.
        # Samples are bytes on CPUs: gloo, also where tensors travel by NCCL.
        groups = {
            d: dist.new_group(ranks, timeout, backend="gloo") for d, ranks in replicas.items()
        }
        self._members = replicas[grid_position.data_rank]
        self._group = groups[grid_position.data_rank]
        self.is_leader = grid_position.rank == self._members[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the `value` of each member, in order; the leader's is the first."""
        values: list[Any] = [None] * len(self._members)
        # Over the replica: each member has another.
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, content: torch.Tensor, member: int) -> list[dist.Work]:
        """Start to send bytes (N,) uint8 to a member, which calls `receive` for as many; return
        what to wait for before `content` changes."""
        destination, group = self._members[member], self._group
        # Over the replica, from its leader to one member: each needs other bytes.
        works = (dist.isend(piece, destination, group) for piece in _message_pieces(content))
        return [work for work in works if work is not None]

    def receive(self, num_bytes: int) -> torch.Tensor:
        """Return the (num_bytes,) uint8 that the leader sends to this member."""
        content = torch.empty(num_bytes, dtype=torch.uint8)
        # Over the replica: what the leader's `send` sends this member.
        for piece in _message_pieces(content):
            dist.recv(piece, self._members[0], self._group)
        return content

    def broadcast(self, parts: Sequence[Buffer]) -> memoryview:
        """Return the leader's `parts`, joined, on every rank of the replica."""
        size = torch.tensor([sum(map(len, parts))])
        if len(self._members) > 1:
            # Over the replica: its leader alone has the parts. First the size, for the buffer.
            dist.broadcast(size, self._members[0], group=self._group)
        joined_bytes = torch.empty(int(size), dtype=torch.uint8)
        buffer, end = joined_bytes.numpy().data, 0
        for part in parts:
            buffer[end : end + len(part)] = part
            end += len(part)
        for piece in _message_pieces(joined_bytes) if len(self._members) > 1 else ():
            # Over the replica: the other ranks receive into an empty buffer of that size.
            dist.broadcast(piece, self._members[0], group=self._group)
        return buffer


def _message_pieces(content: torch.Tensor) -> Sequence[torch.Tensor]:
    return content.split(BROADCAST_BYTES) if len(content) else ()
