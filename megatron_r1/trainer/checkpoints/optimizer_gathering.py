"""Gathers the distributed optimizer's shards in host memory, a slice at a time: of each slice a
rank keeps what it writes.

Megatron's own gathering (distrib_optimizer.py:1262) makes five copies in fresh memory, each whole
on every replica: 66 GiB a rank in the recipe for 2,048 GPUs, of which it writes a sixteenth. It
also leaves out the padding between buckets (:1396) that the index of parameters counts (:1788):
with more than one bucket, the state of all later ones is stored off by up to 127 elements."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.models import platform
from megatron_r1.trainer.checkpoints.staging import AddressRanges, StagingBuffers

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
GATHERED_ELEMENTS = 1 << 24
"""Elements that ranks gather at a time: 64 MiB of the device's memory."""


@contextlib.contextmanager
def gather_in_host_memory(part: Any, index: int, memory: StagingBuffers | None) -> Iterator[None]:
    """Let part `index` of the optimizer plan to gather into `memory` inside the block; without
    memory, only buffers of the right size are made.

    Every data-parallel rank has entries for everything, so that they can share the writing.

    Args:
        part: an optimizer of the chain.
        index: its place among all that are gathered in `memory`.
        memory: the buffers in host memory; None: for loading."""
    part.get_parameter_state_dp_zero = partial(_padded_state, part, index, memory)
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero  # uncovers the class's own method


def _padded_state(part: Any, index: int, memory: StagingBuffers | None, **_: Any) -> dict[Any, Any]:
    """Return the padded state as Megatron's get_parameter_state_dp_zero does: [buffer][dtype][key],
    fp32 [numel] each."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, shards),) = ranges.items()
        if memory is None:
            full_tensors = {
                key: torch.zeros(buffer.numel, dtype=torch.float32) for key in STATE_KEYS
            }
        else:
            full_tensors = {
                key: memory.gathered_buffer((index, number, key), buffer.numel)
                for key in STATE_KEYS
            }
            gather_parts = partial(_gather_buffer, part, buffer, shards, full_tensors)
            memory.plan_gather((index, number), gather_parts)
        state[number] = {dtype: full_tensors}
    return state


def _gather_buffer(
    part: Any,
    buffer: Any,
    shards: list[dict[str, Any]],
    full_tensors: dict[str, Tensor],
    to_save: AddressRanges,
) -> None:
    """Fill `full_tensors`, by key, where they are `to_save`, from the shards of all data-parallel
    ranks."""
    for bucket, shard in zip(buffer.buckets, shards, strict=True):
        end = bucket.offset + bucket.grad_data.numel()
        pieces = {key: tensor[bucket.offset : end] for key, tensor in full_tensors.items()}
        _gather_bucket(part, shard["param_map"], pieces, to_save)


def _gather_bucket(
    part: Any, param_map: dict[Tensor, Any], pieces: dict[str, Tensor], to_save: AddressRanges
) -> None:
    """Fill `pieces` of one bucket, in host memory, where they are `to_save`, from all data-parallel
    ranks' shards of it."""
    size = part.data_parallel_group.size()
    # One key at a time, so that one shard is on the device: 0.7 GiB in the recipe for 2,048 GPUs,
    # where engines leave 4 and three shards would take 2. Each call below returns all three keys.
    for key, piece in pieces.items():
        shard = None
        if size > 1:
            shard = torch.empty(piece.numel() // size, dtype=piece.dtype, device=platform.device())
        for parameter, ranges in param_map.items():
            state = part._get_main_param_and_optimizer_states(parameter)[key].detach()
            span = slice(ranges["gbuf_local"].start, ranges["gbuf_local"].end)
            if shard is None:
                _copy_ranges(piece[span], state, to_save)
            else:
                shard[span].copy_(state, non_blocking=True)
        if shard is not None:
            _all_gather(piece.view(size, -1), shard, part.data_parallel_group, to_save)


def _all_gather(
    piece: Tensor, shard: Tensor, group: dist.ProcessGroup, to_save: AddressRanges
) -> None:
    """Copy to the CPU the parts of `piece` (ranks, elements) that this rank saves, gathered from
    all data-parallel ranks.

    By slices: a bucket may have 10 GiB, and engines on the same GPU leave less.

    Args:
        piece: on the CPU, a row for the shard of each rank.
        shard: (elements,), this rank's part of the optimizer's state.
        group: the data-parallel ranks, over which that state is spread.
        to_save: what this rank saves."""
    length = max(1, GATHERED_ELEMENTS // len(piece))
    for start in range(0, len(shard), length):
        part = shard[start : start + length]
        all_parts = torch.empty(len(piece) * len(part), dtype=shard.dtype, device=shard.device)
        # Over data parallelism: each rank has another shard of the bucket.
        dist.all_gather_into_tensor(all_parts, part, group=group)
        for row, gathered_part in zip(piece, all_parts.view(len(piece), -1), strict=True):
            _copy_ranges(row[start : start + length], gathered_part, to_save)


def _copy_ranges(target: Tensor, values: Tensor, to_save: AddressRanges) -> None:
    """Copy `values` (numel,) to `target` where it is `to_save`."""
    for part in to_save.overlaps(target):
        target[part].copy_(values.view(-1)[part], non_blocking=True)
