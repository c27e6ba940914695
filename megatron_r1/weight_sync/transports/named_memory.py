"""Memory that two processes of one host share: a file in /dev/shm whose name is removed as soon as
both have mapped it, so that nothing outlives them.

The process that creates a file holds a lock on it until then; a file without a lock was left by a
killed process, and `sweep` removes it.
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
    """A file in /dev/shm of `num_bytes`, locked until it is closed; `close` also removes its name
    if the other side has not. Raises OSError where there is no room."""

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
        """Unlock and remove the file. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)


def sweep() -> None:
    """Remove the files that killed processes have left in /dev/shm."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            # A new one may not be locked yet.
            if time.time() - os.fstat(file.fileno()).st_mtime > SWEEP_AGE_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def map_bytes(path: Path, num_bytes: int) -> torch.Tensor:
    """Map a file, uint8. Raises OSError where the other side has removed it."""
    path.stat()  # torch would create one
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)
