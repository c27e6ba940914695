"""Keeps a run's folder to one process, by a lock on a file in it."""

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError

LOCK = ".lock"
_FLOCK = "hhqqi0q"  # struct flock of Linux: type, whence, start, length, pid


class FolderLock:
    """An exclusive lock on a file, released by the kernel however its process ends.

    A POSIX lock (lockf) rather than flock: forked workers inherit a flock, and would keep the
    folder locked when they outlive a killed parent. A POSIX lock does not exclude its own process,
    hence `_locked_folders`."""

    _locked_folders: set[str] = set()

    def __init__(self, path: Path):
        self.key = str(path.resolve())
        if self.key in self._locked_folders:
            raise UserError(
                f"{path.parent} is already in use by this process; close that run first",
                key="run.folder",
                cause=Cause.BUSY,
            )
        self.file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open for the lock
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.file.close()
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}), which keeps two runs out of one "
                    "folder; put run.folder on a file system with POSIX locks",
                    key="run.folder",
                    cause=Cause.UNSUPPORTED,
                ) from error
            self.file.seek(0)
            owner = self.file.read().strip() or "unknown"
            self.file.close()
            raise UserError(
                f"{path.parent} is in use by another run ({owner}); "
                "wait for it, stop it, or choose another folder",
                key="run.folder",
                cause=Cause.BUSY,
            ) from error
        self.file.truncate(0)
        self.file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()
        self._locked_folders.add(self.key)

    def release(self) -> None:
        """Give the folder free."""
        self._locked_folders.discard(self.key)
        self.file.close()


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the lock of a run's folder.

    The process that holds the lock must not call this: closing the file would release it."""
    path = folder / LOCK
    if not path.is_file():
        return False
    with path.open("rb") as file:
        query = struct.pack(_FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
        lock_type = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, query))[0]
    return lock_type != fcntl.F_UNLCK
