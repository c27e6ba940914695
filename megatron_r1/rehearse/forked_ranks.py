"""Trainer ranks that are forked from one process, after what all of them import: `python -m
megatron_r1.rehearse.forked_ranks RANKS LOG_FOLDER VERB RECIPE …`, in place of torchrun.

Imports are most of the CPU time of a rank that does three steps with a small model: 4 of 7 s.
torchrun can fork, too, but by then has threads, and one start in six of 16 ranks hung."""

import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

from megatron_r1.base.processes import children
from megatron_r1.base.processes.process_memory import without_garbage_collection
from megatron_r1.models import platform

IMPORTED_MODULES = (
    "megatron_r1.commands.cli",
    "megatron_r1.commands.rl",
    "megatron_r1.trainer.rank_server",
    "megatron_r1.trainer.trainer",
    "megatron_r1.trainer.rank_server",
    "megatron_r1.push.rank_push",
)


def main() -> int:
    """Return the exit status: as torchrun's, 1 as soon as a rank fails; the others then end."""
    children.end_without_parent()
    world_size, logs, *arguments = sys.argv[1:]
    platform.prepare_process()
    with without_garbage_collection():
        for module in IMPORTED_MODULES:
            importlib.import_module(module)
    port = children.free_port("127.0.0.1")
    running = set()
    for rank in range(int(world_size)):
        process = os.fork()
        if not process:
            _start_rank(rank, int(world_size), port, Path(logs))
            sys.argv[1:] = arguments
            runpy.run_module("megatron_r1", run_name="__main__")  # it ends with SystemExit
        running.add(process)
    status = 0
    while running:
        ended, result = os.wait()
        running.discard(ended)
        if result and not status:
            status = 1
            for process in running:
                os.kill(process, signal.SIGTERM)
    return status


def _start_rank(rank: int, world_size: int, port: int, logs: Path) -> None:
    """Be a rank as torchrun starts one; all but rank 0 write to a file of their own.

    Args:
        rank: its number, from 0 to `world_size` - 1.
        world_size: the number of ranks.
        port: the port on which they meet.
        logs: the folder of their logs."""
    children.die_with_parent()
    os.environ |= children.rank_variables(rank, world_size, port)
    if rank:
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{rank}.log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


if __name__ == "__main__":
    sys.exit(main())
