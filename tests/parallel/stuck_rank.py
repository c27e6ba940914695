"""A rank that adds up for ever: `stuck_rank.py CONTROLLER_ADDRESS`, under torchrun's variables."""

import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from megatron_r1.training import witness, worker
from megatron_r1.training.wire import witness_identity


def add_up(values: torch.Tensor) -> None:
    dist.all_reduce(values)


if __name__ == "__main__":
    witness.ALONE_SECONDS = 1.0
    rank = int(os.environ["RANK"])
    own = witness.Witness(partial(worker._connected, witness_identity(rank), sys.argv[1]))
    dist.init_process_group("gloo")
    own.now_in("update")
    while True:
        add_up(torch.ones(4))
