"""From a rank's sharded entries to copies in host memory that nobody trains on.

Megatron plans: which rank writes which shard of what, into which file, in the torch_dist format.
It would also write, in processes forked from this one; a fork of a process with CUDA, NCCL or gloo
threads is luck, and its spawned alternative wants a GPU. So only the plan is taken from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
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
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_r1 import platform
from megatron_r1.training.checkpoints.host_memory import HostMemory

BACKEND, VERSION = "torch_dist", 1
FILES_PER_RANK = 2  # written side by side


@dataclass
class StagedFile:
    """One file to be: items are pairs of Megatron's write item and its bytes or host tensor."""

    path: Path
    items: list[tuple[Any, Any]]


@dataclass
class Staged:
    """What this rank writes. metadata: where every tensor lies, on rank 0 only."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None
    files: list[StagedFile]


def stage(tree: dict[str, Any], partial: Path, memory: HostMemory) -> Staged:
    """Plan together with all ranks and copy this rank's part; training may go on then.

    partial: an empty folder, which gets the small part that all ranks share (common.pt).
    """
    memory.reuse()
    plan = _PlanOnly(memory)
    # Every data-parallel rank has the same weights and, gathered, the same optimizer state: each
    # writes its share of them.
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(plan, group)
    dist_checkpointing.save(tree, str(partial), strategy, async_sharded_save=True)
    assert plan.staged is not None, "dist_checkpointing.save did not come to the strategy"
    if platform.has_gpu():
        torch.cuda.synchronize()
    return plan.staged


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would hand the writing to a process."""

    def __init__(self, memory: HostMemory):
        super().__init__(BACKEND, VERSION)
        self.memory = memory
        self.staged: Staged | None = None

    def async_save(self, sharded_state_dict, checkpoint_dir) -> AsyncRequest:
        by_key = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
        writer = _Copier(checkpoint_dir, self.memory)
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self.staged = Staged(writer, planned[1], writer.files)
        return AsyncRequest(None, (), [])


class _Copier(FileSystemWriterAsync):
    """Copies where Megatron's prepares to write: into memory of ours, whatever device it is on."""

    def __init__(self, folder: str | Path, memory: HostMemory):
        super().__init__(folder, thread_count=FILES_PER_RANK)
        self.memory = memory
        self.files: list[StagedFile] = []

    def prepare_write_data(self, plan, planner) -> None:
        for number, items in enumerate(_split_by_size_and_type(FILES_PER_RANK, plan.items)):
            if not items:
                continue
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            copies = [(item, self._copy(item, planner.resolve_data(item))) for item in items]
            self.files.append(StagedFile(Path(self.checkpoint_dir) / name, copies))

    def _copy(self, item, resolved):
        return resolved if item.type == WriteItemType.BYTE_IO else self.memory.copy(resolved)
