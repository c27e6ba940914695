"""The buffers in host memory that a checkpoint's entries are copied to, kept from one checkpoint to
the next.

Fresh memory is slow: its pages are faulted in one by one, and pinned for a fast copy where there
are few of them. The price of keeping it is that the memory is taken for the whole run: what one
rank writes.

The optimizer's state is gathered here, after Megatron has planned which rank writes what
(`optimizer_gathering`). Megatron plans with tensors of the full size. Their buffers reserve
addresses for all elements, but take memory only for the pages that are written to."""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from megatron_r1.models import platform

OPTIMIZER = "optimizer.state."
"""What the keys of the gathered state begin with (distrib_optimizer.py:1748)."""


class AddressRanges:
    """The host memory that some tensors lie in."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in sorted(map(_address_range, tensors)):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif begin < end:
                self._begins.append(begin)
                self._ends.append(end)

    @property
    def num_bytes(self) -> int:
        """Bytes of all ranges together."""
        return sum(self._ends) - sum(self._begins)

    def overlaps(self, tensor: Tensor) -> Iterator[slice]:
        """Yield what of `tensor`, (numel,) contiguous, lies in these ranges."""
        begin, end = _address_range(tensor)
        width, index = tensor.element_size(), bisect_right(self._ends, begin)
        while index < len(self._begins) and self._begins[index] < end:
            first, last = max(begin, self._begins[index]), min(end, self._ends[index])
            yield slice((first - begin) // width, (last - begin) // width)
            index += 1

    def contains(self, tensor: Tensor) -> bool:
        """Whether all of `tensor` lies in these ranges."""
        begin, end = _address_range(tensor)
        index = bisect_right(self._ends, begin)
        in_one = index < len(self._begins) and self._begins[index] <= begin
        return begin == end or (in_one and end <= self._ends[index])


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of `tensor` and of the one behind its last."""
    begin, width = tensor.data_ptr(), tensor.element_size()
    if not tensor.numel():
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return begin, begin + width * (1 + sum((size - 1) * stride for size, stride in steps))


Gathering = Callable[[AddressRanges], None]
"""Gathers one buffer of the optimizer's state: what of it lies in the ranges."""


class StagingBuffers:
    """The buffers of one rank; the next save overwrites them after `reuse`.

    Attributes:
        filled: what of the gathered buffers this save writes."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], list[Tensor]] = {}
        self._num_used: dict[tuple[Any, ...], int] = {}
        self._gathered: dict[Hashable, Tensor] = {}
        self._storages: set[int] = set()
        self._planned: dict[Hashable, Gathering] = {}
        self.filled = AddressRanges([])

    def reuse(self) -> None:
        """Mark all copies as free."""
        self._num_used = {}

    def gathered_buffer(self, name: Hashable, numel: int) -> Tensor:
        """Return the buffer called `name`, (numel,) fp32, for entries to be planned with; `gather`
        fills it. Of its pages only those that were written to take memory."""
        buffer = self._gathered.get(name)
        if buffer is None or buffer.numel() != numel:
            pages = mmap.mmap(-1, max(1, 4 * numel), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            buffer = self._gathered[name] = torch.frombuffer(pages, dtype=torch.float32)[:numel]
            self._storages.add(buffer.untyped_storage().data_ptr())
        return buffer

    def plan_gather(self, name: Hashable, gathering: Gathering) -> None:
        """Have `gather` fill the buffers of one part of the optimizer.

        Args:
            name: the part's; a later plan of this name replaces the earlier one.
            gathering: called on all ranks of data parallelism together."""
        self._planned[name] = gathering

    def gather(self, entries: dict[str, Any]) -> None:
        """Fill the gathered buffers where this rank writes them; call on all ranks together.

        Args:
            entries: sharded entries, distributed over the ranks that hold them.

        Raises:
            AssertionError: an entry of the optimizer that is a copy of what is not gathered yet."""
        tensors = []
        for entry in nested_values(entries):
            if isinstance(entry, ShardedTensor) and is_main_replica(entry.replica_id):
                if self._is_gathered(entry.data):
                    tensors.append(entry.data)
                else:
                    assert not entry.key.startswith(OPTIMIZER), f"{entry.key} is not gathered"
        self.filled = AddressRanges(tensors)
        for gather_parts in self._planned.values():
            gather_parts(self.filled)
        self._planned = {}

    def _is_gathered(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    def copy(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on the CPU, of its shape and dtype, contiguous and alone in its storage.

        A part of a gathered buffer is not copied again. A copy from a GPU is complete after
        `platform.synchronize`."""
        tensor = tensor.detach()
        is_gathered = self._is_gathered(tensor)
        assert not is_gathered or self.filled.contains(tensor), "written without being gathered"
        if is_gathered and tensor.is_contiguous():
            # A view with a storage of its own: torch.save writes the whole storage.
            return torch.from_numpy(tensor.numpy())
        shape_and_dtype = (tuple(tensor.shape), tensor.dtype)
        index = self._num_used.get(shape_and_dtype, 0)
        self._num_used[shape_and_dtype] = index + 1
        buffers = self._copies.setdefault(shape_and_dtype, [])
        if index == len(buffers):
            buffers.append(platform.empty_in_host_memory(*shape_and_dtype))
        return buffers[index].copy_(tensor, non_blocking=True)
