"""What the processes of this host hold, and what killed ones leave behind: their state and memory
as the kernel shows them, files in shared memory, temporary folders, and how many files one may
have open."""

import contextlib
import fcntl
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import psutil

from megatron_r1.base.errors import Cause, UserError


def session_members(leader: int) -> list[int]:
    """Return the ids of all processes in the session of process `leader`; none for 0, the number of
    a process that has not been started."""
    members = []
    for pid in psutil.pids() if leader else ():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == leader:
                members.append(pid)
    return members


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, of their children, and so on, zombies included."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def state(pid: int) -> str | None:
    """Return a process's state in psutil's words ("running", "stopped", "disk-sleep", …), or None
    if it has ended."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


def catches_signal(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, which would otherwise end it."""
    with contextlib.suppress(OSError):  # psutil does not show SigCgt
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


class PeakMemory:
    """The most memory that the descendants of this process hold at one time within the `with`
    block: `gib`, in proportional shares (PSS), where a page that several processes map counts
    once."""

    def __init__(self, every_seconds: float = 5.0):
        """Prepare the measurements.

        Args:
            every_seconds: time between two measurements. One took 90 ms for 10 GiB."""
        self.gib = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._measure, args=(every_seconds,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _measure(self, every_seconds: float) -> None:
        while not self._end.wait(every_seconds):
            self.gib = max(self.gib, sum(map(_held, descendants(os.getpid()))) / 2**30)


def _held(pid: int) -> int:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(pid).memory_full_info().pss
    return 0


SCRATCH_PREFIX = "r1_"
"""How the name of a `Scratch` begins. Short, as paths of sockets may have 107 bytes."""
SHARED_MEMORY = Path("/dev/shm")
OWNER = ".r1_owner"
"""File in a `Scratch`, which its owner keeps locked (flock) until it ends. Its lines name the files
in shared memory that are deleted with the folder."""


class Scratch(tempfile.TemporaryDirectory):
    """A temporary folder for one process and those under it, until `cleanup`. That of a killed
    process is deleted when the next one is made.

    The kernel releases a lock at the end of its process, and where hosts or containers share the
    folder for temporary files too, in which the number of a process says nothing."""

    def __init__(self) -> None:
        _sweep()
        is_ours = False
        while not is_ours:
            super().__init__(prefix=SCRATCH_PREFIX, ignore_cleanup_errors=True)
            self._owner = open(Path(self.name, OWNER), "x", encoding="utf-8")  # noqa: SIM115
            with contextlib.suppress(OSError):  # a file system without locks: never swept
                fcntl.flock(self._owner, fcntl.LOCK_EX)
            # Unless another process has swept it before the lock.
            is_ours = bool(os.fstat(self._owner.fileno()).st_nlink)

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make these processes use the folder."""
        # Compiled kernels stay outside, for the next engine to use.
        compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        return {
            "TMPDIR": self.name,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled),
        }

    def add_shared(self, paths: Iterable[Path]) -> None:
        """Delete these files in shared memory with the folder, as their processes may be killed."""
        if not self._owner.closed:
            self._owner.writelines(f"{path}\n" for path in paths)
            self._owner.flush()

    def cleanup(self) -> None:
        """Delete the folder, and the files of `add_shared`. A second call does nothing."""
        if not self._owner.closed:
            remove_scratch(Path(self.name))
            self._owner.close()
        super().cleanup()


def _sweep() -> None:
    """Delete the folders of `Scratch` whose owners have ended, and their files in shared memory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        # Not a folder that others have made, another user's, or one that is being deleted.
        with contextlib.suppress(OSError), open(folder / OWNER, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_scratch(folder)


def shared_files(session: int) -> list[Path]:
    """Return the files in /dev/shm that processes of a session have mapped: queues between vLLM's
    ranks, whose names are random and which stay when the ranks are killed."""
    mapped: set[str] = set()
    for pid in session_members(session):
        # psutil's memory_maps reads smaps instead, which walks every page of the process.
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped.update(line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line)
    return [path for name in sorted(mapped) if (path := Path(name)).exists()]


def remove_scratch(folder: Path) -> None:
    """Delete a folder, and the files in shared memory that it lists, if a `Scratch` of this user
    has made it.

    Anyone can make such a folder where temporary files are, so another user's is left alone, and
    only files directly in /dev/shm are deleted."""
    owner = folder / OWNER
    try:
        if any(path.stat(follow_symlinks=False).st_uid != os.geteuid() for path in (folder, owner)):
            return
        shared = owner.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for path in map(Path, shared):
        if path.parent == SHARED_MEMORY and path.name != "..":
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def allow_open_files(needed: int, reason: str) -> None:
    """Raise this process's soft limit to `needed`, if it is lower.

    Args:
        needed: open files.
        reason: what needs so many.

    Raises:
        UserError: where the hard limit does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{reason}: {needed:,} open files, and this process may have {hard:,}; raise the limit "
            f"(ulimit -Hn {needed}, or LimitNOFILE of the service that starts it)",
            key="ulimit -n",
            cause=Cause.TOO_LARGE,
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
