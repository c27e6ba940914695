"""Gathers the distributed optimizer's shards on the host, in one copy.

Megatron's own gathering (distrib_optimizer.py:977) makes five copies in fresh memory. It also
leaves out the padding between buckets (:1112) that the index of parameters counts (:1499): with
more than one bucket, the state of all later ones is stored off by up to 127 elements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import platform
from megatron_r1.training.checkpoints.host_memory import HostMemory

KEYS = ("param", "exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def gathering(part: Any, index: int, memory: HostMemory | None) -> Iterator[None]:
    """Within the context, part `index` of the optimizer gathers into `memory`; without memory, only
    buffers of the right size are made.

    Every data-parallel rank gets everything, so that they can share the writing."""
    part.get_parameter_state_dp_zero = partial(_gather, part, index, memory)
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero  # uncovers the class's own method


def _gather(part: Any, index: int, memory: HostMemory | None, **_: Any) -> dict[Any, Any]:
    """Return the padded state as Megatron's get_parameter_state_dp_zero does: [buffer][dtype][key],
    fp32 [numel] each."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, shards),) = ranges.items()
        if memory is None:
            wholes = {key: torch.zeros(buffer.numel, dtype=torch.float32) for key in KEYS}
        else:
            wholes = {key: memory.gathered((index, number, key), buffer.numel) for key in KEYS}
            for bucket, shard in zip(buffer.buckets, shards, strict=True):
                end = bucket.offset + bucket.grad_data.numel()
                pieces = {key: whole[bucket.offset : end] for key, whole in wholes.items()}
                _gather_bucket(part, shard["param_map"], pieces)
        state[number] = {dtype: wholes}
    return state


def _gather_bucket(part: Any, param_map: dict, pieces: dict[str, Tensor]) -> None:
    """Fill `pieces`, host buffers of one bucket, from all data-parallel ranks' shards of it."""
    group = part.data_parallel_group
    size = group.size()
    shards = pieces
    if size > 1:
        shards = {
            key: torch.empty(piece.numel() // size, dtype=piece.dtype, device=platform.device())
            for key, piece in pieces.items()
        }
    for parameter, ranges in param_map.items():
        tensors = part._get_main_param_and_optimizer_states(parameter)
        here = slice(ranges["gbuf_local"].start, ranges["gbuf_local"].end)
        for key, shard in shards.items():
            shard[here].copy_(tensors[key].detach(), non_blocking=True)
    if size > 1:
        for key, shard in shards.items():
            whole = torch.empty(shard.numel() * size, dtype=shard.dtype, device=shard.device)
            # Over data parallelism, which the optimizer's state is spread over.
            dist.all_gather_into_tensor(whole, shard, group=group)
            pieces[key].copy_(whole, non_blocking=True)
