"""Starts and stops child processes, which end with the process that started them
(`r1_grading.base.lifetime`)."""

import contextlib
import errno
import random
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from r1_grading.base.lifetime import (
    PARENT,
    Child,
    die_with_parent,
    end_without_parent,
    kill_group,
    popen_options,
    prctl,
)

__all__ = ["PARENT", "die_with_parent", "end_without_parent", "prctl"]


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` with its output appended to `log`; see `popen_options`.

    Args:
        command: program and arguments.
        log: the file.
        environment: variables over those of this process; None: none."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, **popen_options(environment)
        )


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables by which torchrun names a rank of this machine.

    Args:
        rank: the process's rank.
        world_size: the number of ranks in all.
        port: the port of torch.distributed's store, which rank 0 hosts.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Stoppable(Child, Protocol):
    """A child process of `subprocess` or of `fork_client`."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


def stop(
    process: Stoppable, timeout_seconds: float = 10.0, kill_seconds: float | None = None
) -> None:
    """Send SIGTERM, wait, then kill the process with everything in its session's first group.

    Args:
        process: the process that leads its process group.
        timeout_seconds: how long it may take to end by itself.
        kill_seconds: the time-out of `kill`.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_seconds)
    kill(process, kill_seconds)


def kill(process: Stoppable, timeout_seconds: float | None = None) -> None:
    """Kill a process that leads its process group, and the group; harmless if it has ended.

    Args:
        process: the process that leads its process group.
        timeout_seconds: how long to wait for its end, None: until it has ended. A process inside a
            driver that hangs does not end even so.
    """
    if not process.pid:
        process.terminate()
    kill_group(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_seconds)


def free_port(host: str = "") -> int:
    """Return a TCP port that is free now, for a process that will listen on it later.

    The port is not one of those that the system gives to outgoing connections (Linux: from 32,768
    on), which could be taken by then."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(errno.EADDRINUSE, "100 ports between 20,000 and 32,000 are all taken")
