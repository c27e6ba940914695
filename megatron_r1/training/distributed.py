"""Process groups: who this rank is, from torchrun's environment and Megatron's grid."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_r1 import platform
from megatron_r1.config import ParallelConfig


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank on the parallel grid; the controller routes batches by them."""

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    tensor_rank: int
    pipeline_rank: int
    last_stage: bool


def initialize(parallel: ParallelConfig, seed: int) -> Place:
    """Join the process group, lay out Megatron's grid and seed every random stream.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them.
    """
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    parallel.check_sizes(world_size)
    torch.set_num_threads(parallel.threads or max(1, (os.cpu_count() or 1) // local_world))
    device = platform.prepare(int(os.environ.get("LOCAL_RANK", rank)))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        dist.init_process_group(
            platform.distributed_backend(), device_id=device if platform.has_gpu() else None
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Place(
        rank=rank,
        world_size=world_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        last_stage=parallel_state.is_pipeline_last_stage(),
    )


def from_rank_zero(value: str | None) -> str:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None, "rank 0 has to know"
    return box[0]
