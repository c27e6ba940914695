"""Copies a rank's sharded entries into host memory, as planned by Megatron, in buffers that are
kept from one checkpoint to the next.

Megatron's planner decides which rank writes which shard of which tensor into which file, in the
torch_dist format. Megatron would also write, in processes forked from this one; a fork of a
process with CUDA, NCCL or gloo threads is undefined, and its spawned alternative needs a GPU. So
only the plan is taken from it, and `writer` writes in threads.

Fresh memory is slow: its pages are faulted in one by one, and pinned for a fast copy where there
are few of them. The price of keeping it is that the memory is taken for the whole run: what one
rank writes.

The distributed optimizer's shards are gathered here, a slice at a time and after Megatron has
planned: of each slice a rank keeps what it writes. The entries that are planned with lie in
buffers of the whole part's size, of which pages that nobody writes to take no memory. Megatron's
own gathering (distrib_optimizer.py:977) makes five copies in fresh memory, each whole on every
replica: 66 GiB a rank in the recipe for 2,048 GPUs, of which it writes a sixteenth. It also leaves
out the padding between buckets (:1112) that the index of parameters counts (:1499): with more than
one bucket, the state of all later ones is stored off by up to 127 elements."""

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from megatron_r1.models import platform

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
GATHERED_ELEMENTS = 1 << 24
"""Elements that ranks gather at a time: 64 MiB of the device's memory."""


OPTIMIZER = "optimizer.state."
"""What the keys of the gathered state begin with (distrib_optimizer.py:1462)."""


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


BACKEND, VERSION = "torch_dist", 1
FILES_PER_RANK = 2  # written side by side


@dataclass
class StagedFile:
    """A file to write.

    Attributes:
        path: the file's path.
        items: pairs of Megatron's write item and its bytes or tensor on the CPU."""

    path: Path
    items: list[tuple[Any, Any]]


@dataclass
class StagedCheckpoint:
    """The part that this rank writes.

    Attributes:
        writer: Megatron's writer of the checkpoint.
        metadata: the file of every tensor, on rank 0 only.
        files: the files that this rank writes."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None
    files: list[StagedFile]


def stage_checkpoint(
    sharded_state_dict: dict[str, Any],
    partial_folder: Path,
    memory: StagingBuffers,
    data_group: ProcessGroup,
) -> StagedCheckpoint:
    """Plan together with all ranks and copy this rank's part; training may continue afterwards.

    Args:
        sharded_state_dict: the sharded entries.
        partial_folder: an empty folder, into which the small part that all ranks share is written
            (common.pt).
        memory: the buffers in host memory that they are copied to.
        data_group: the data- and context-parallel ranks."""
    memory.reuse()
    plan = _PlanOnly(memory)
    # Over data and context parallelism: these ranks have the same weights and, gathered, the same
    # optimizer state, so each writes its share of them.
    strategy = FullyParallelSaveStrategyWrapper(plan, data_group)
    dist_checkpointing.save(
        sharded_state_dict, str(partial_folder), strategy, async_sharded_save=True
    )
    assert plan.staged is not None, "dist_checkpointing.save did not come to the strategy"
    platform.synchronize()  # the copies to pinned memory are asynchronous
    return plan.staged


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would start a writing process."""

    def __init__(self, memory: StagingBuffers):
        super().__init__(BACKEND, VERSION)
        self.memory = memory
        self.staged: StagedCheckpoint | None = None

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        self.memory.gather(sharded_state_dict)
        by_key = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
        writer = _Copier(checkpoint_dir, self.memory)
        write_plan, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self.staged = StagedCheckpoint(writer, write_plan[1], writer.files)
        return AsyncRequest(None, (), [])


class _Copier(FileSystemWriterAsync):
    """Copies into `StagingBuffers`, from any device, when Megatron prepares to write."""

    def __init__(self, folder: str | Path, memory: StagingBuffers):
        super().__init__(folder, thread_count=FILES_PER_RANK)
        self.memory = memory
        self.files: list[StagedFile] = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        for number, items in enumerate(_split_by_size_and_type(FILES_PER_RANK, plan.items)):
            if not items:
                continue
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            copies = [(item, self._copy_item(item, planner.resolve_data(item))) for item in items]
            self.files.append(StagedFile(Path(self.checkpoint_dir) / name, copies))

    def _copy_item(self, item: WriteItem, resolved: Any) -> Any:
        return resolved if item.type == WriteItemType.BYTE_IO else self.memory.copy(resolved)
