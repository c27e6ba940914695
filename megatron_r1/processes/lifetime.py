"""Processes that end with the process that started them. Standard library only."""

import ctypes
import os
import signal

PARENT = "MEGATRON_R1_PARENT"
"""Environment variable: the process id of the parent."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_without_parent() -> None:
    """Call `die_with_parent`, and exit with status 1 if the parent has already ended."""
    die_with_parent()
    if os.environ.pop(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when the thread that created it ends (Linux).

    vLLM's engine core, for example, notices a vanished API server only at its next message; an idle
    one would keep its memory and its cores for ever. Does nothing on systems without prctl.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        return
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
