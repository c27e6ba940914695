"""A rank that does not come to a collective operation: `late_rank.py OUT`, on two ranks.

Writes what the other one would reply to the controller, and the limits of all process groups."""

import json
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from megatron_r1.config import ParallelConfig
from megatron_r1.models.weights.export import run_on_rank_zero
from megatron_r1.trainer import distributed, rank_monitor, rank_server
from megatron_r1.trainer.replica import Replica

TIMEOUT_SECONDS = 12_345.0
LATE_SECONDS = 0.5


def limit(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def main() -> None:
    out = Path(sys.argv[1])
    parallel = ParallelConfig(tensor=2, timeout_seconds=TIMEOUT_SECONDS)
    grid_position = distributed.initialize(parallel, seed=0)
    replica = Replica(grid_position, timedelta(seconds=parallel.timeout_seconds))
    groups = [dist.group.WORLD, grid_position.groups.tp, grid_position.groups.dp_cp, replica._group]
    limits = [limit(group) for group in groups]
    store = dist.distributed_c10d._get_default_store()
    if grid_position.rank == 1:  # late
        store.get("has given up")
        store.set("has seen that", "")
        os._exit(0)
    _set_pg_timeout(timedelta(seconds=LATE_SECONDS), dist.group.WORLD)
    monitor = rank_monitor.RankMonitor(partial(sys.exit, 0))
    monitor.groups = grid_position.groups
    monitor.enter("export")
    try:
        run_on_rank_zero(lambda: None)
    except RuntimeError as error:
        sentences = [
            rank_server._describe_late_ranks(error, monitor, limit)
            for limit in (LATE_SECONDS, TIMEOUT_SECONDS)
        ]
        out.write_text(json.dumps({"limits": limits, "sentences": sentences}))
    store.set("has given up", "")
    store.get("has seen that")  # this process has the store
    os._exit(0)


if __name__ == "__main__":
    main()
