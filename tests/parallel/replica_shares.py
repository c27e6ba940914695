"""What each rank is handed when only the leader of its replica was sent something.

`replica_shares.py OUT GRID…`; a grid is (tensor, pipeline), the rest of the ranks are replicas."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_r1.config import ParallelConfig
from megatron_r1.trainer import distributed, replica


def main() -> None:
    out, *grids = sys.argv[1:]
    for grid in grids:
        tensor, pipeline = map(int, grid.split("x"))
        grid_position = distributed.initialize(
            ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0
        )
        from megatron.core import parallel_state

        replica.BROADCAST_BYTES = 7  # several broadcasts
        members = replica.Replica(grid_position)
        sent = [[], []]
        if members.is_leader:
            sent[0] = [b"share of ", b"", f"replica {grid_position.data_rank}".encode()]
        got = [bytes(members.broadcast(parts)).decode() for parts in sent]
        everyone = [None] * grid_position.world_size
        dist.all_gather_object(everyone, (grid_position.data_rank, members.is_leader, got))
        if grid_position.rank == 0:
            Path(out, f"{grid}.json").write_text(json.dumps(everyone))
        parallel_state.destroy_model_parallel()
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
