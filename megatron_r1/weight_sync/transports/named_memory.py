"""Memory that two processes of one host share: a file in /dev/shm whose name is gone as soon as all
have mapped it, so that nothing of it outlives them.

Who makes one holds a lock on it until then: what a killed process has left is known by that, and
swept away.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

import torch

FOLDER = Path("/dev/shm")
PREFIX = "megatron_r1_"
SWEEP_AGE_SECONDS = 60.0


class NamedMemory:
    """A file in /dev/shm with room for `num_bytes`, locked until it is closed, which also takes its
    name away, where the other side has not done so. Raises OSError where there is no room."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._is_open = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Not only sized: a write through a map into a full filesystem is a bus error.
            os.posix_fallocate(self._descriptor, 0, num_bytes)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Harmless if done."""
        if self._is_open:
            self._is_open = False
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)


def sweep() -> None:
    """Take away what processes that were killed have left in /dev/shm."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            # A new one may not be locked yet.
            if time.time() - os.fstat(file.fileno()).st_mtime > SWEEP_AGE_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def map_bytes(path: Path, num_bytes: int) -> torch.Tensor:
    """Raises OSError where the other side has given up, and its file is gone."""
    path.stat()  # torch would make one
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
