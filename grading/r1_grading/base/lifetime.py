"""Child processes that end with the process that started them. Standard library only.

`python lifetime.py COMMAND …` becomes COMMAND, which does so too."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

PARENT = "MEGATRON_R1_PARENT"
"""Environment variable: the process id of the parent."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child(Protocol):
    """A child process of `subprocess`, of `fork_client` or of asyncio.

    Attributes:
        pid: 0 for a process that has not been started.
        returncode: None until it was waited for."""

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""

    @property
    def returncode(self) -> int | None:
        """The exit status; None until it was waited for."""


def end_without_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` when the parent ends.

    If the parent has ended already, exit with status 1.

    For the first line of a process that `children` starts. The kernel's signal comes at the end of
    the *thread* that started this process."""
    die_with_parent(number)
    if os.environ.pop(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` when the thread that created this process ends (Linux).

    As `prctl` otherwise."""
    # vLLM's engine core, for example, detects a vanished API server only at its next message; an
    # idle one would keep its memory and its cores for ever.
    prctl(PR_SET_PDEATHSIG, number)


def prctl(option: int, value: int) -> None:
    """Set an option of this process on Linux; do nothing on other systems.

    Raises:
        OSError: the system refuses the option or the value.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl") and libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def popen_options(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return arguments of `Popen` for a child in a session of its own.

    Its environment is this process's with `environment` over it.

    The child calls `end_without_parent` first, so that it ends with the calling thread:
    call from a thread that lives as long as the child should. (`preexec_fn` could do that here, but
    it runs Python between fork and exec, which can deadlock in a process with threads.)"""
    return {
        "stdin": subprocess.DEVNULL,
        "env": {**os.environ, **(environment or {}), PARENT: str(os.getpid())},
        # Ctrl-C is this process's to handle, and the child can be killed with all it has started.
        "start_new_session": True,
    }


def kill_group(leader: Child) -> None:
    """Kill what is left of the process group that `leader` leads or has led."""
    if leader.pid and owns_number(leader):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)


def owns_number(leader: Child) -> bool:
    """Return whether the process's number still is its own, and not a later process's.

    The number of a group or session that it has led counts as its own.

    Linux may give the number away once the process has been waited for, but not while a member of
    the group or session is left. So where a process has it then, that is another one."""
    return leader.returncode is None or not Path(f"/proc/{leader.pid}").exists()


if __name__ == "__main__":
    end_without_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
