"""A rank that adds up for ever: `stuck_rank.py CONTROLLER_ADDRESS`, under torchrun's variables."""

import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from megatron_r1.trainer import rank_monitor, rank_server
from megatron_r1.trainer.rank_messages import monitor_identity


def add_up(values: torch.Tensor) -> None:
    dist.all_reduce(values)


if __name__ == "__main__":
    rank_monitor.GRACE_SECONDS = 1.0
    rank = int(os.environ["RANK"])
    own = rank_monitor.RankMonitor(
        partial(rank_server._connected_socket, monitor_identity(rank), sys.argv[1])
    )
    dist.init_process_group("gloo")
    own.enter("update")
    while True:
        add_up(torch.ones(4))
