"""No engine process outlives the process that started it, however that one ends."""

import ctypes
import os
import signal

PARENT = "MEGATRON_R1_PARENT"
"""Environment variable: process id of who started this one."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_without_parent() -> None:
    """Once, first of all: `die_with_parent`, also where the parent has ended already."""
    die_with_parent()
    if os.environ.pop(PARENT, str(os.getppid())) != str(os.getppid()):
        os._exit(1)


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the thread that created it ends (Linux).

    vLLM's engine core notices a vanished API server only at its next message, that is, never when
    idle: it would keep its memory and its cores. Does nothing on systems without prctl.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        return
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
