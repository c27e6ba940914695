"""Process groups: who this rank is, from torchrun's environment and Megatron's grid."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_r1 import platform
from megatron_r1.config import ParallelConfig
from megatron_r1.models.pipeline_stages import parse_layout


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
    _hush_libraries(rank)
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
        virtual_pipeline_model_parallel_size=_chunks(parallel),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        get_embedding_ranks=partial(embedding_ranks, parallel.pipeline_layout),
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


def _hush_libraries(rank: int) -> None:
    """Leave out warnings that nobody can act on, unless PYTHONWARNINGS is set: what rank 0 says
    already, what torch says of Megatron's calls, and on a CPU that Megatron misses Apex."""
    if sys.warnoptions:
        return
    if rank:
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
    if not platform.has_gpu():
        warnings.filterwarnings("ignore", module=r"megatron\.core\.")


def leave() -> None:
    """End the process groups, as the last thing a rank does with them.

    A thread of gloo that still holds a tensor of the last collective while Python is torn down ends
    the process by signal 6 (pytorch/pytorch#190489); here it is waited for.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _chunks(parallel: ParallelConfig) -> int | None:
    chunks = parallel.virtual_pipeline
    if parallel.pipeline_layout:
        chunks = len(parse_layout(parallel.pipeline_layout)) // parallel.pipeline
    return chunks if chunks > 1 else None


def embedding_ranks(pipeline_layout: str | None, pipeline: Sequence[int]) -> list[int]:
    """Of the ranks of one pipeline, those that keep a copy of the embedding in step: the first, and
    the one with the MTP layers, which without a layout is the last.

    Where MTP layers stand apart from the head, the last rank's head would else be taken for a copy
    (Megatron-Core 0.16.1, language_module.py:47).
    """
    with_copy = pipeline[-1]
    for index, stage in enumerate(parse_layout(pipeline_layout) if pipeline_layout else []):
        if "m" in stage:
            with_copy = pipeline[index % len(pipeline)]
    return list(dict.fromkeys([pipeline[0], with_copy]))


def from_rank_zero(value: str | None) -> str:
    """Rank 0's `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None, "rank 0 has to know"
    return box[0]
