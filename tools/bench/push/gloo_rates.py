"""Rates of gloo between processes of this machine: messages one way, a ring, and its all-gather.

In a push over gloo each engine rank passes weights on to one other at a time, as in a ring
(`push/transports/gloo.py`)."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_r1.base.processes.children import free_port
from megatron_r1.base.transports import RELAY_BUCKET_BYTES

ROUNDS, REPEATS = 8, 5


def gloo_rates(num_processes: int = 2) -> dict[str, Any]:
    """Return GB/s into each process, the best of `REPEATS`."""
    port = free_port("127.0.0.1")
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(_gloo_rank, (num_processes, port, results), num_processes)
    return {"processes": num_processes, "bytes of a message": RELAY_BUCKET_BYTES, **results.get()}


def _gloo_rank(rank: int, size: int, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    bucket, received = (torch.zeros(RELAY_BUCKET_BYTES, dtype=torch.uint8) for _ in range(2))
    gathered = torch.zeros(size * RELAY_BUCKET_BYTES, dtype=torch.uint8)

    def one_way() -> None:
        if rank == 0:
            group.send([bucket], 1, 0).wait()
        elif rank == 1:
            group.recv([bucket], 0, 0).wait()

    def ring() -> None:
        transfers = (
            group.send([bucket], (rank + 1) % size, 0),
            group.recv([received], (rank - 1) % size, 0),
        )
        for work in transfers:
            work.wait()

    def all_gather() -> None:
        group._allgather_base(gathered, bucket).wait()

    result = {
        "one way, GB/s": _gloo_rate(one_way, RELAY_BUCKET_BYTES),
        "ring, GB/s": _gloo_rate(ring, RELAY_BUCKET_BYTES),
        "all-gather, GB/s": _gloo_rate(all_gather, (size - 1) * RELAY_BUCKET_BYTES),
    }
    if rank == 1:
        results.put(result)
    dist.destroy_process_group()


def _gloo_rate(step: Callable[[], None], num_bytes: int) -> float:
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            step()
        seconds.append(time.perf_counter() - start)
    return ROUNDS * num_bytes / min(seconds) / 1e9
