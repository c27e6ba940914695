"""Joins the process groups; a rank's position on Megatron's grid, and its model replica, whose
first rank sends the others their samples."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megatron_r1.config import ParallelConfig
from megatron_r1.models import platform
from megatron_r1.models.pipeline_stages import num_chunks
from megatron_r1.trainer.training_sample import Buffer

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class GridPosition:
    """The process groups of a rank, and its coordinates in them.

    Attributes:
        groups: made once by `initialize`, handed to everything that communicates.
        rank: the global rank, from 0.
        world_size: all trainer ranks.
        data_rank: the index of its model replica, by which the controller distributes batches.
        data_parallel: the data-parallel size, the number of replicas.
        tensor_rank: the index in its tensor-parallel group.
        pipeline_rank: its pipeline stage, from 0.
        context_rank: the index in its context-parallel group.
        expert_rank: the index in its expert-parallel group.
        is_last_stage: whether the rank is on the last pipeline stage, which computes the loss.
    """

    groups: ProcessGroupCollection
    rank: int
    world_size: int
    data_rank: int
    data_parallel: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    expert_rank: int
    is_last_stage: bool


def initialize(parallel: ParallelConfig, seed: int) -> GridPosition:
    """Prepare this process for Megatron and its models, join the process group, create Megatron's
    groups and seed every random stream.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them."""
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    parallel.check_sizes(world_size)
    _hush_libraries(rank)
    torch.set_num_threads(parallel.threads or max(1, (os.cpu_count() or 1) // local_world_size))
    platform.prepare(int(os.environ.get("LOCAL_RANK", rank)))
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_r1.models import patches
    from megatron_r1.models.gradients import embedding_ranks

    patches.install()
    timeout = timedelta(seconds=parallel.wait_seconds)
    platform.join_process_group(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_chunks(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        get_embedding_ranks=partial(embedding_ranks, parallel.pipeline_layout),
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    # Read from Megatron's globals once, here: the model, its gradient buffers, the optimizer, the
    # schedule and the checkpoints are handed these.
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GridPosition(
        groups=groups,
        rank=rank,
        world_size=world_size,
        data_rank=groups.dp.rank(),
        data_parallel=groups.dp.size(),
        tensor_rank=groups.tp.rank(),
        pipeline_rank=groups.pp.rank(),
        context_rank=groups.cp.rank(),
        expert_rank=groups.ep.rank(),
        is_last_stage=groups.pp.rank() == groups.pp.size() - 1,
    )


def _hush_libraries(rank: int) -> None:
    """Ignore warnings that a user cannot act on, unless PYTHONWARNINGS is set: those that rank 0
    prints too, torch's about Megatron's calls, and Megatron's about missing CUDA libraries."""
    if sys.warnoptions:
        return
    if rank:
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
    platform.silence_warnings()


def leave_process_groups() -> None:
    """Destroy the process groups; a rank calls this last.

    This waits for gloo's threads: one that still holds a tensor of the last collective while Python
    shuts down ends the process by signal 6 (pytorch/pytorch#190489)."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _chunks(parallel: ParallelConfig) -> int | None:
    chunks = num_chunks(parallel)
    return chunks if chunks > 1 else None


T = TypeVar("T")
BROADCAST_BYTES = 1 << 30
"""Bytes of one broadcast or send; a replica's share of long responses has gigabytes."""


class Replica:
    """The ranks that hold one copy of the model between them and see the same samples; created on
    every rank together, after Megatron's grid.

    The controller sends a data-parallel share to the first rank of each replica only, which sends
    it on to the others: it travels over the controller's network once, however many ranks the
    replica has, and no rank sees another replica's samples."""

    def __init__(self, position: GridPosition, timeout: timedelta | None = None):
        """Make the replica's process group.

        Args:
            position: this rank's place in the grid.
            timeout: the time that the other ranks of the replica have to come to a broadcast; None
                for torch's."""
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
        self.is_leader = position.rank == self._members[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the `value` of each member, in order; the leader's is the first."""
        values: list[Any] = [None] * len(self._members)
        # Over the replica: each member has another.
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, content: torch.Tensor, member: int) -> list[dist.Work]:
        """Start to send bytes (N,) uint8 to a member, which calls `receive` for as many; return
        what to wait for before `content` changes."""
        to, group = self._members[member], self._group
        sent = (dist.isend(piece, to, group) for piece in _pieces(content))
        return [work for work in sent if work is not None]

    def receive(self, num_bytes: int) -> torch.Tensor:
        """Return the (num_bytes,) uint8 that the leader sends to this member."""
        content = torch.empty(num_bytes, dtype=torch.uint8)
        for piece in _pieces(content):
            dist.recv(piece, self._members[0], self._group)
        return content

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
        for piece in _pieces(joined) if len(self._members) > 1 else ():
            # Over the replica: the other ranks receive into an empty buffer of that size.
            dist.broadcast(piece, self._members[0], group=self._group)
        return buffer


def _pieces(content: torch.Tensor) -> Sequence[torch.Tensor]:
    return content.split(BROADCAST_BYTES) if len(content) else ()
