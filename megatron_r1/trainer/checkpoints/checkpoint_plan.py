"""Plans with Megatron what a rank writes of a checkpoint, and copies that into host memory.

Megatron's planner decides which rank writes which shard of which tensor into which file, in the
torch_dist format. Megatron would also write, in processes forked from this one; a fork of a
process with CUDA, NCCL or gloo threads is undefined, and its spawned alternative needs a GPU. So
only the plan is taken from it, and `writer` writes in threads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
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
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from megatron_r1.models import platform
from megatron_r1.trainer.checkpoints.staging import StagingBuffers

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

    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = ""
    ) -> AsyncRequest:
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
