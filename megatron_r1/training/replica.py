"""A model replica: the ranks that hold one copy of the model between them and see the same samples.

The controller sends a data-parallel share to the first rank of each replica only, which passes it
on: a share travels over the controller's wire once, however many tensor, pipeline and context ranks
the replica has, and no rank sees another replica's samples.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_r1 import platform
from megatron_r1.training.distributed import Place


class Replica:
    """This rank's replica; made on every rank together, after the grid."""

    def __init__(self, place: Place):
        mine = torch.tensor([place.data_rank], device=platform.device())
        everyone = [torch.empty_like(mine) for _ in range(place.world_size)]
        dist.all_gather(everyone, mine)
        replicas: dict[int, list[int]] = {}
        for rank, data_rank in enumerate(everyone):
            replicas.setdefault(int(data_rank), []).append(rank)
        # Every rank makes every group: use_local_synchronization names a group by how many its
        # rank has made, in which ranks differ (torch 2.13, distributed_c10d.py:5467), and hangs.
        # Samples are bytes on hosts: gloo, also where tensors travel by NCCL.
        groups = {d: dist.new_group(ranks, backend="gloo") for d, ranks in replicas.items()}
        self._members, self._group = replicas[place.data_rank], groups[place.data_rank]
        self.leads = place.rank == self._members[0]

    def share(self, payload: bytes | None) -> bytes:
        """The leader's `payload`, on every rank of the replica."""
        if len(self._members) == 1:
            assert payload is not None
            return payload
        size = torch.tensor([len(payload or b"")])
        dist.broadcast(size, self._members[0], group=self._group)
        if not size.item():
            return b""
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.leads:
            buffer = torch.frombuffer(bytearray(payload or b""), dtype=torch.uint8)
        dist.broadcast(buffer, self._members[0], group=self._group)
        return buffer.numpy().tobytes()
