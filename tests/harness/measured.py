"""Runs a command and prints what it took and left: `python tests/harness/measured.py COMMAND …`.

The last lines are CPU seconds of all processes, elapsed time, the most memory that they held at one
time (PSS: a page that several processes map counts once), and what is left of them: processes,
temporary files, shared memory, listening ports. Exit status: the command's, or 1 where a process is
left; a run that is killed with SIGKILL, as some tests do, cannot remove its files. The command gets
a TMPDIR of its own, which stays where the command fails."""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from watchdog import activity_of

from megatron_r1.base.processes.host_memory import PeakMemory

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SHARED_MEMORY = Path("/dev/shm")
END_SECONDS = 30.0
"""Patience with processes that are ending when the command has ended. Idle ones are left."""
END_CPU_SECONDS = 120.0
"""What they may compute by then. Those that go on do not end."""


def main(command: list[str]) -> int:
    """Run `command`; return the exit status."""
    # Processes whose parents have ended become children of this one, so that none is missed.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    start, shared = time.monotonic(), set(SHARED_MEMORY.iterdir())
    scratch = Path(tempfile.mkdtemp(prefix="r1t_"))  # short: paths of sockets have 107 bytes
    # What torch compiles stays, for the next run.
    compiled = os.environ.get(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    )
    folders = {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": compiled}
    process = subprocess.Popen(command, env=os.environ | folders)
    # Ctrl-C reaches the command as well, which ends first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    with PeakMemory() as memory:
        status = wait_for(process)
        processes = end_processes()
        left = processes + left_files(scratch, shared)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    if status == 0 and not processes:
        shutil.rmtree(scratch)
    else:
        print(f"temporary files are in {scratch}")
    print(
        f"{usage.ru_utime + usage.ru_stime:.0f} CPU seconds ({usage.ru_utime:.0f} user, "
        f"{usage.ru_stime:.0f} system) in {minutes} min {seconds:02d} s on {os.cpu_count()} cores, "
        f"of which {len(os.sched_getaffinity(0))} usable; "
        f"peak memory {memory.gib:.1f} GiB (PSS)"
    )
    print("\n".join(["left behind:", *left]) if left else "nothing is left behind")
    return status or int(bool(processes))


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for the command, and for every orphan that ends before it; return its exit status."""
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode if process.returncode >= 0 else 128 - process.returncode


def end_processes() -> list[str]:
    """Return a line for each process that is left, and each port on which it listens; end them."""
    idle_since, spent = time.monotonic(), 0.0
    computed, waited = activity_of(p.pid for p in living())
    while (members := living()) and time.monotonic() - idle_since < END_SECONDS:
        before, computed, waited_before = computed, 0.0, waited
        computed, waited = activity_of(p.pid for p in members)
        # A process that waits for a core is not idle: it may be about to end.
        if computed > before + 0.01 or waited > waited_before + 0.01:
            idle_since, spent = time.monotonic(), spent + max(0.0, computed - before)
        if spent > END_CPU_SECONDS:
            break
        time.sleep(0.2)
        reap()
    lines = [line for process in members for line in describe(process)]
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(members)
    reap()
    return lines


def left_files(scratch: Path, shared: set[Path]) -> list[str]:
    """Return a line for each new file in shared memory that no process uses, and for each temporary
    file. shared: what was in shared memory before."""
    lines, mine = [], os.getuid()
    for path in sorted(SHARED_MEMORY.iterdir()):
        with contextlib.suppress(OSError):
            if path not in shared and path.stat().st_uid == mine and not is_mapped(path):
                lines.append(f"shared memory {path}")
    files = [path for path in scratch.iterdir() if not path.name.startswith("pytest-of-")]
    return lines + [f"temporary file {path}" for path in files]


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def living() -> list[psutil.Process]:
    """Return the processes that descend from this one and have not ended."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def describe(process: psutil.Process) -> list[str]:
    """Return a line for a process, and one for each TCP port on which it listens."""
    with contextlib.suppress(psutil.Error):
        lines = [f"process {process.pid}: {' '.join(process.cmdline())[:200]}"]
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                lines.append(f"port {connection.laddr.port} of process {process.pid}")
        return lines
    return []


def is_mapped(path: Path) -> bool:
    """Return whether a process of this user still uses a file in shared memory."""
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if str(path) in Path(f"/proc/{pid}/maps").read_text():
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
