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

from megatron_r1 import platform

KEYS = ("param", "exp_avg", "exp_avg_sq")


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
        kind = (tuple(tensor.shape), tensor.dtype)
        index = self._num_used.get(kind, 0)
        self._num_used[kind] = index + 1
        buffers = self._copies.setdefault(kind, [])
        if index == len(buffers):
            buffers.append(platform.empty_on_host(*kind))
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
