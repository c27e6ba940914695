"""Child processes that end with this process."""

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.processes import lifetime


class Child(Protocol):
    """A child process of `subprocess`, of `preloaded` or of asyncio.

    pid: 0 for a process that has not been started. returncode: None until it was waited for."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` with its output appended to `log`; see `popen_options`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, **popen_options(environment)
        )


def popen_options(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return arguments of `Popen` for a child in a session of its own, whose environment is this
    process's with `environment` over it.

    The child calls `lifetime.end_without_parent` first, so that it ends with the calling thread:
    call from a thread that lives as long as the child should. (`preexec_fn` could do that here, but
    it runs Python between fork and exec, which can deadlock in a process with threads.)"""
    return {
        "stdin": subprocess.DEVNULL,
        "env": {**os.environ, **(environment or {}), lifetime.PARENT: str(os.getpid())},
        # Ctrl-C is this process's to handle, and the child can be killed with all it has started.
        "start_new_session": True,
    }


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables by which torchrun names a rank of this machine. port: the
    port of torch.distributed's store, which rank 0 hosts."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Stoppable(Child, Protocol):
    """A child process of `subprocess` or of `preloaded`."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


def stop(
    process: Stoppable, timeout_seconds: float = 10.0, kill_seconds: float | None = None
) -> None:
    """Send SIGTERM, wait, then kill the process with everything in its session's first group.
    kill_seconds: as `kill`'s."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_seconds)
    kill(process, kill_seconds)


def kill(process: Stoppable, timeout_seconds: float | None = None) -> None:
    """Kill a process that leads its process group, and the group; harmless if it has ended.

    timeout_seconds: how long to wait for its end, None: until it has ended. A process inside a
    driver that hangs does not end even so."""
    if not process.pid:
        process.terminate()
    kill_group(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_seconds)


def kill_group(leader: Child) -> None:
    """Kill what is left of the process group that `leader` leads or has led."""
    if leader.pid and owns_number(leader):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)


def owns_number(leader: Child) -> bool:
    """Return whether the process's number still is its own, or that of the group and the session
    that it has led, and not a later process's.

    Linux may give the number away once the process has been waited for, but not while a member of
    the group or session is left. So where a process has it then, that is another one."""
    return leader.returncode is None or not Path(f"/proc/{leader.pid}").exists()


def free_port(host: str = "") -> int:
    """Return a TCP port that is free now, for a process that will listen on it later.

    The port is not one of those that the system gives to outgoing connections (Linux: from 32,768
    on), which could be taken by then."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(errno.EADDRINUSE, "100 ports between 20,000 and 32,000 are all taken")
