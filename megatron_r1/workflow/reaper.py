"""Between a pipeline and a command it starts: `python -m megatron_r1.workflow.reaper COMMAND…`.

Whatever ends the pipeline, kill -9 included, nothing that the command has started goes on: orphans
of it become children of this process (Linux: child subreaper), which the kernel tells of its
parent's death, and which then kills all of them. Also what outlives the command's own end is
killed. SIGTERM and SIGINT are handed on to the command alone, so that it can end in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

from megatron_r1.processes.inspection import descendants
from megatron_r1.processes.lifetime import die_with_parent, end_without_parent, prctl

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KILL = signal.SIGUSR1
"""Sent by the kernel when the parent is gone, or by the parent: end everything now."""


def main(command: list[str]) -> int:
    """Exit status: the command's; 128 + N where signal N ended it."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(KILL, lambda *_: _end())
    end_without_parent(KILL)
    try:
        child = subprocess.Popen(command, preexec_fn=die_with_parent)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _hand_on(child, number))
    status = child.wait()
    kill_descendants()
    return status if status >= 0 else 128 - status


def _hand_on(child: subprocess.Popen, number: int) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)


def _end() -> None:
    kill_descendants()
    os._exit(128 + signal.SIGKILL)


def kill_descendants() -> None:
    """Returns when there are none; a process that is killed may have started one meanwhile."""
    while found := descendants(os.getpid()):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
