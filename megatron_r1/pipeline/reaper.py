"""Runs one command and kills everything it started when it ends, or when the pipeline does.

`python -m megatron_r1.pipeline.reaper COMMAND…` stands between a pipeline and a command. Orphans of
the command become its children (Linux: child subreaper). The kernel signals it when the pipeline
dies, by kill -9 too, and it then kills all of them. SIGTERM and SIGINT are passed on to the command
alone, so that it can end in order."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from megatron_r1.base.processes.inspection import descendants
from megatron_r1.base.processes.lifetime import die_with_parent, end_without_parent, prctl

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KILL = signal.SIGUSR1
"""Sent by the kernel when the parent is gone, or by the parent: kill everything now."""


def main(command: list[str]) -> int:
    """Return the command's exit status; 128 + N where signal N ended it."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(KILL, lambda *_: _kill_all())
    end_without_parent(KILL)
    try:
        child = subprocess.Popen(command, preexec_fn=die_with_parent)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: child.send_signal(number))
    status = child.wait()
    kill_descendants()
    return status if status >= 0 else 128 - status


def _kill_all() -> None:
    kill_descendants()
    os._exit(128 + signal.SIGKILL)


def kill_descendants() -> None:
    """Kill until there are none: a process may start another one before it dies."""
    while pids := descendants(os.getpid()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
