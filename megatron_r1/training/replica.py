"""A model replica: the ranks that hold one copy of the model between them and see the same samples.

The controller sends a data-parallel share to the first rank of each replica only, which sends it on
to the others. A share therefore travels over the controller's network once, however many tensor,
pipeline and context ranks the replica has, and no rank sees another replica's samples."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_r1 import platform
from megatron_r1.training.distributed import GridPosition


class Replica:
    """This rank's replica; created on every rank together, after Megatron's grid."""

    def __init__(self, position: GridPosition):
        own = torch.tensor([position.data_rank], device=platform.device())
        data_ranks = [torch.empty_like(own) for _ in range(position.world_size)]
        dist.all_gather(data_ranks, own)  # over all ranks: each needs the members of all replicas
        replicas: dict[int, list[int]] = {}
        for rank, data_rank in enumerate(data_ranks):
            replicas.setdefault(int(data_rank), []).append(rank)
        # Every rank creates every group: use_local_synchronization names a group by how many its
        # rank has created, in which ranks differ (torch 2.13, distributed_c10d.py:5467), and hangs.
        # Samples are bytes on hosts: gloo, also where tensors travel by NCCL.
        groups = {d: dist.new_group(ranks, backend="gloo") for d, ranks in replicas.items()}
        self._members, self._group = replicas[position.data_rank], groups[position.data_rank]
        self.leads = position.rank == self._members[0]

    def share(self, payload: bytes | None) -> bytes:
        """Return the leader's `payload` on every rank of the replica."""
        if len(self._members) == 1:
            assert payload is not None
            return payload
        # Over the replica: its leader alone received the payload. First the size, for the buffer.
        size = torch.tensor([len(payload or b"")])
        dist.broadcast(size, self._members[0], group=self._group)
        if not size.item():
            return b""
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.leads:
            buffer = torch.frombuffer(bytearray(payload or b""), dtype=torch.uint8)
        dist.broadcast(buffer, self._members[0], group=self._group)
        return buffer.numpy().tobytes()
