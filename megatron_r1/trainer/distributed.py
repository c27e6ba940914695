"""Joins and leaves the process groups; a rank's position on Megatron's grid."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_r1.config import ParallelConfig
from megatron_r1.models import platform
from megatron_r1.models.pipeline_stages import num_chunks

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
        data_parallel_size: the number of model replicas.
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
    data_parallel_size: int
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
    platform.prepare_process(int(os.environ.get("LOCAL_RANK", rank)))
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_r1.models import patches
    from megatron_r1.models.gradients import embedding_ranks

    patches.install()
    timeout = timedelta(seconds=parallel.timeout_seconds)
    platform.join_process_group(timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=_virtual_pipeline_size(parallel),
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
        data_parallel_size=groups.dp.size(),
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


def _virtual_pipeline_size(parallel: ParallelConfig) -> int | None:
    chunks = num_chunks(parallel)
    return chunks if chunks > 1 else None
