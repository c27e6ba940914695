"""Host buffers for checkpoints, kept from one checkpoint to the next.

Fresh memory is slow: its pages are faulted in one by one, and on a GPU they have to be pinned for a
fast copy. The price is that the memory is taken for the whole run: what one rank writes, and its
part of the optimizer whole.

The distributed optimizer's shards are gathered here in one copy. Megatron's own gathering
(distrib_optimizer.py:977) makes five copies in fresh memory. It also leaves out the padding between
buckets (:1112) that the index of parameters counts (:1499): with more than one bucket, the state of
all later ones is stored off by up to 127 elements."""

import contextlib
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.models import platform

KEYS = ("param", "exp_avg", "exp_avg_sq")
GATHERED_ELEMENTS = 1 << 24
"""Elements that ranks gather at a time: 64 MiB of the device's memory."""


class HostMemory:
    """The buffers of one rank; the next save overwrites them after `reuse`."""

    def __init__(self) -> None:
        self._copies: dict[tuple, list[Tensor]] = {}
        self._num_used: dict[tuple, int] = {}
        self._gathered: dict[Hashable, Tensor] = {}
        self._storages: set[int] = set()

    def reuse(self) -> None:
        """Mark all copies as free."""
        self._num_used = {}

    def gathered(self, name: Hashable, numel: int) -> Tensor:
        """Return the buffer called `name`, (numel,) fp32, with its previous content."""
        buffer = self._gathered.get(name)
        if buffer is None or buffer.numel() != numel:
            buffer = self._gathered[name] = platform.empty_on_host((numel,), torch.float32)
            self._storages.add(buffer.untyped_storage().data_ptr())
        return buffer

    def copy(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on the host, of its shape and dtype, contiguous and alone in its storage.

        A part of a gathered buffer is not copied again. A copy from a GPU is complete after
        `platform.synchronize`."""
        tensor = tensor.detach()
        is_gathered = tensor.untyped_storage().data_ptr() in self._storages
        if is_gathered and tensor.is_contiguous():
            # A view with a storage of its own: torch.save writes the whole storage.
            return torch.from_numpy(tensor.numpy())
        shape_and_dtype = (tuple(tensor.shape), tensor.dtype)
        index = self._num_used.get(shape_and_dtype, 0)
        self._num_used[shape_and_dtype] = index + 1
        buffers = self._copies.setdefault(shape_and_dtype, [])
        if index == len(buffers):
            buffers.append(platform.empty_on_host(*shape_and_dtype))
        return buffers[index].copy_(tensor, non_blocking=True)


@contextlib.contextmanager
def gathered_on_host(part: Any, index: int, memory: HostMemory | None) -> Iterator[None]:
    """Let part `index` of the optimizer gather into `memory` inside the block; without memory, only
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
    size = part.data_parallel_group.size()
    # One key at a time, so that one shard is on the device: 0.7 GiB in the recipe for 2,048 GPUs,
    # where engines leave 4 and three shards would take 2. Each call below returns all three keys.
    for key, piece in pieces.items():
        shard = piece
        if size > 1:
            shard = torch.empty(piece.numel() // size, dtype=piece.dtype, device=platform.device())
        for parameter, ranges in param_map.items():
            state = part._get_main_param_and_optimizer_states(parameter)[key]
            here = slice(ranges["gbuf_local"].start, ranges["gbuf_local"].end)
            shard[here].copy_(state.detach(), non_blocking=True)
        if size > 1:
            _all_gather(piece.view(size, -1), shard, part.data_parallel_group)


def _all_gather(piece: Tensor, shard: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `piece` (ranks, elements), on the host, with the shards (elements,) of all ranks of data
    parallelism, over which the optimizer's state is spread. By slices: a bucket may have 10 GiB,
    and engines on the same GPU leave less."""
    length = max(1, GATHERED_ELEMENTS // len(piece))
    for start in range(0, len(shard), length):
        part = shard[start : start + length]
        whole = torch.empty(len(piece) * len(part), dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(whole, part, group=group)
        piece[:, start : start + length].copy_(whole.view(len(piece), -1), non_blocking=True)
