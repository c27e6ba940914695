"""The trainer ranks that the controller starts: their processes, and how one has ended."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

from megatron_r1.base.processes import (
    children,
    collective_timeouts,
    fork_client,
    oom_kills,
    process_memory,
)
from megatron_r1.base.processes.authentication import RANKS_TOKEN_VARIABLE
from megatron_r1.base.processes.fork_client import ForkedProcess
from megatron_r1.base.processes.log_excerpts import last_lines, log_end
from megatron_r1.config import Config
from megatron_r1.engines.server import gpu
from megatron_r1.models.device_connections import trainer_connections

MEMORY_REMEDY = (
    "lower parallel.tokens_per_microbatch, parallel.processes, rollout.engines or "
    "rollout.kv_cache_gib, or set parallel.recompute"
)
EXIT_SECONDS = 5.0
"""How long a rank may take to end after its connection has closed, on a busy machine."""
RANK_MODULE = "megatron_r1.trainer.rank"
"""What a rank's process runs."""


def import_environment() -> dict[str, str]:
    """Return the variables of all ranks that libraries read when they are imported."""
    # Threads that wait for work must not spin: engines, other ranks and other runs compute on the
    # same cores. Two runs side by side: 7 to 12 s instead of 6.
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}


class RankProcesses:
    """Trainer ranks as child processes, by rank; empty where torchrun starts them."""

    def __init__(self, log_folder: Path):
        """Prepare to start ranks.

        Args:
            log_folder: where each rank's output is written."""
        self._log_folder = log_folder
        self._processes: list[ForkedProcess | subprocess.Popen[bytes]] = []
        self._kills_before = 0
        self._timeout_seconds = 0.0

    @property
    def started_here(self) -> bool:
        """Whether this controller started the ranks; torchrun or Slurm may have."""
        return bool(self._processes)

    @property
    def are_alive(self) -> bool:
        """Whether none of the ranks started here has ended."""
        return all(process.poll() is None for process in self._processes)

    def start(self, config: Config, address: str, token: str) -> None:
        """Start `parallel.processes` ranks.

        Args:
            config: the recipe.
            address: the controller's address, which they connect to.
            token: the secret of the ZeroMQ connection."""
        world_size = config.parallel.processes
        port = children.free_port("127.0.0.1")
        settings = config.model_dump_json()
        self._kills_before = oom_kills.num_oom_kills()
        self._timeout_seconds = config.parallel.timeout_seconds
        gpu_variables = (
            process_memory.trainer_allocator(os.environ)
            | trainer_connections(config.parallel, os.environ, gpu.architecture())
            if gpu.is_usable()
            else {}
        )
        for rank in range(world_size):
            environment = {
                **children.rank_variables(rank, world_size, port),
                RANKS_TOKEN_VARIABLE: token,
                **import_environment(),
                **gpu_variables,
            }
            self._processes.append(
                _start_rank([address, settings], self._log_path(rank), environment)
            )

    def stop(self) -> None:
        """End every rank: SIGTERM, and after five seconds SIGKILL."""
        for process in self._processes:
            children.stop(process, timeout_seconds=5)

    def kill(self) -> None:
        """Kill the ranks that this controller started."""
        for process in self._processes:
            children.kill(process)

    def clear(self) -> None:
        """Forget the ranks, after all have ended."""
        self._processes = []

    def process_id(self, rank: int) -> int | None:
        """Return the process id of `rank`; None if torchrun started it."""
        return self._processes[rank].pid or None if rank < len(self._processes) else None

    def first_ended(self, replied: Container[int]) -> int | None:
        """Return the first rank that has ended and is not in `replied`, or None."""
        ended_ranks = (r for r, p in enumerate(self._processes) if p.poll() is not None)
        return next((rank for rank in ended_ranks if rank not in replied), None)

    def first_killed(self) -> int | None:
        """Return the first rank that a signal ended, or None."""
        return next((r for r, p in enumerate(self._processes) if (p.poll() or 0) < 0), None)

    def cause_of_death(self, rank: int, operation: str) -> str:
        """Return a sentence on how `rank` ended, with the end of its log.

        Args:
            rank: its number among all trainer ranks, from 0.
            operation: the name of the call that it was in."""
        if rank >= len(self._processes):
            return f"trainer rank {rank} is gone"
        code, log = None, self._log_path(rank)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._processes[rank].wait(timeout=EXIT_SECONDS)
        ending = (
            f"was killed by signal {-code}" if code and code < 0 else f"exited with code {code}"
        )
        if code == -signal.SIGKILL:
            ending += oom_kills.oom_explanation(self._kills_before, MEMORY_REMEDY)
        collective = collective_timeouts.collective_wait(log_end(log), self._timeout_seconds)
        if collective is not None:
            ending += (
                f" in {operation!r} after it waited for other ranks in {collective}; "
                f"{collective_timeouts.timeout_remedy(self._timeout_seconds)}"
            )
        if code is None:  # its connection closed, and the process has not ended
            ending = "is gone"
        return f"trainer rank {rank} {ending}; the end of {log}:\n{last_lines(log)}"

    def _log_path(self, rank: int) -> Path:
        return self._log_folder / f"trainer_{rank}.log"


def _start_rank(
    arguments: list[str], log: Path, environment: dict[str, str]
) -> ForkedProcess | subprocess.Popen[bytes]:
    if gpu.is_usable():  # the import of Megatron-Core initializes CUDA: no process can be forked
        return children.start([sys.executable, "-m", RANK_MODULE, *arguments], log, environment)
    return fork_client.start(RANK_MODULE, arguments, log, environment)
