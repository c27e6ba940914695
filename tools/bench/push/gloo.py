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
from megatron_r1.push.transports import PASSED_BYTES

ROUNDS, REPEATS = 8, 5


def rates(num_processes: int = 2) -> dict[str, Any]:
    """Return GB/s into each process, the best of `REPEATS`."""
    port = free_port("127.0.0.1")
    context = torch.multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    torch.multiprocessing.spawn(_rank, (num_processes, port, found), num_processes)
    return {"processes": num_processes, "bytes of a message": PASSED_BYTES, **found.get()}


def _rank(rank: int, size: int, port: int, found: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    own, other = (torch.zeros(PASSED_BYTES, dtype=torch.uint8) for _ in range(2))
    whole = torch.zeros(size * PASSED_BYTES, dtype=torch.uint8)

    def one_way() -> None:
        if rank == 0:
            group.send([own], 1, 0).wait()
        elif rank == 1:
            group.recv([own], 0, 0).wait()

    def ring() -> None:
        both = group.send([own], (rank + 1) % size, 0), group.recv([other], (rank - 1) % size, 0)
        for work in both:
            work.wait()

    def all_gather() -> None:
        group._allgather_base(whole, own).wait()

    result = {
        "one way, GB/s": _rate(one_way, PASSED_BYTES),
        "ring, GB/s": _rate(ring, PASSED_BYTES),
        "all-gather, GB/s": _rate(all_gather, (size - 1) * PASSED_BYTES),
    }
    if rank == 1:
        found.put(result)
    dist.destroy_process_group()


def _rate(step: Callable[[], None], num_bytes: int) -> float:
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            step()
        seconds.append(time.perf_counter() - start)
    return ROUNDS * num_bytes / min(seconds) / 1e9
