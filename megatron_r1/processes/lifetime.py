"""Processes that end with the process that started them. Standard library only.

`python lifetime.py COMMAND …` becomes COMMAND, which does so too."""

import ctypes
import os
import signal
import sys

PARENT = "MEGATRON_R1_PARENT"
"""Environment variable: the process id of the parent."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_without_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send signal `number` when the parent ends, or exit with status 1 if it has
    ended already.

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
    """Set an option of this process on Linux; do nothing on other systems. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl") and libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


if __name__ == "__main__":
    end_without_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
