"""Sends the samples of a model replica from its first rank to the others."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_r1.models import platform
from megatron_r1.trainer.distributed import GridPosition
from megatron_r1.trainer.sample import Buffer

BROADCAST_BYTES = 1 << 30
"""Samples of one broadcast; a replica's share of long responses with routing has gigabytes."""


class Replica:
    """The ranks that hold one copy of the model between them and see the same samples; created on
    every rank together, after Megatron's grid.

    The controller sends a data-parallel share to the first rank of each replica only, which sends
    it on to the others: it travels over the controller's network once, however many ranks the
    replica has, and no rank sees another replica's samples."""

    def __init__(self, position: GridPosition, timeout: timedelta | None = None):
        """timeout: for the other ranks of the replica to come to a broadcast; None for torch's."""
        own = torch.tensor([position.data_rank], device=platform.device())
        data_ranks = [torch.empty_like(own) for _ in range(position.world_size)]
        dist.all_gather(data_ranks, own)  # over all ranks: each needs the members of all replicas
        replicas: dict[int, list[int]] = {}
        for rank, data_rank in enumerate(data_ranks):
            replicas.setdefault(int(data_rank), []).append(rank)
        # Every rank creates every group. With use_local_synchronization a group's name is the count
        # of groups that its rank has made (torch 2.13, distributed_c10d.py:5467); ranks disagree on
        # it and hang.
        # Samples are bytes on hosts: gloo, also where tensors travel by NCCL.
        groups = {
            d: dist.new_group(ranks, timeout, backend="gloo") for d, ranks in replicas.items()
        }
        self._members, self._group = replicas[position.data_rank], groups[position.data_rank]
        self.leads = position.rank == self._members[0]

    def broadcast(self, parts: Sequence[Buffer]) -> memoryview:
        """Return the leader's `parts`, joined, on every rank of the replica."""
        size = torch.tensor([sum(map(len, parts))])
        if len(self._members) > 1:
            # Over the replica: its leader alone has the parts. First the size, for the buffer.
            dist.broadcast(size, self._members[0], group=self._group)
        joined = torch.empty(int(size), dtype=torch.uint8)
        buffer, end = joined.numpy().data, 0
        for part in parts:
            buffer[end : end + len(part)] = part
            end += len(part)
        for piece in joined.split(BROADCAST_BYTES) if size and len(self._members) > 1 else ():
            # Over the replica: the other ranks receive into an empty buffer of that size.
            dist.broadcast(piece, self._members[0], group=self._group)
        return buffer
