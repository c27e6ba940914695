"""Temporary folders of processes that may be killed, deleted with their files in shared memory."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_r1.base.processes.process_table import session_members

SCRATCH_PREFIX = "r1_"
"""How the name of a `Scratch` begins. Short, as paths of sockets may have 107 bytes."""
SHARED_MEMORY = Path("/dev/shm")
OWNER = ".r1_owner"
"""File in a `Scratch`, which its owner keeps locked (flock) until it ends. Its lines name the files
in shared memory that are deleted with the folder."""


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder for one process and those under it, until `cleanup`. That of a killed
    process is deleted when the next one is made.

    The kernel releases a lock at the end of its process, and where hosts or containers share the
    folder for temporary files too, in which the number of a process says nothing."""

    def __init__(self) -> None:
        _delete_abandoned_folders()
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
        compile_cache = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        return {
            "TMPDIR": self.name,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compile_cache),
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


def _delete_abandoned_folders() -> None:
    """Delete the folders of `Scratch` whose owners have ended, and their files in shared memory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        # Not a folder that others have made, another user's, or one that is being deleted.
        with contextlib.suppress(OSError), open(folder / OWNER, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_scratch(folder)


def shared_files(session: int) -> list[Path]:
    """Return the files in /dev/shm that processes of a session have mapped: queues between vLLM's
    ranks, whose names are random and which stay when the ranks are killed."""
    mapped_names: set[str] = set()
    for pid in session_members(session):
        # psutil's memory_maps reads smaps instead, which walks every page of the process.
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped_names.update(line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line)
    return [path for name in sorted(mapped_names) if (path := Path(name)).exists()]


def remove_scratch(folder: Path) -> None:
    """Delete a folder, and the files in shared memory that it lists, if a `Scratch` of this user
    has made it.

    Anyone can make such a folder where temporary files are, so another user's is left alone, and
    only files directly in /dev/shm are deleted."""
    owner = folder / OWNER
    try:
        if any(path.stat(follow_symlinks=False).st_uid != os.geteuid() for path in (folder, owner)):
            return
        shared_names = owner.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for path in map(Path, shared_names):
        if path.parent == SHARED_MEMORY and path.name != "..":
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
