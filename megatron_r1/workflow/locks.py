"""Whether a process works in a folder: looks at the lock of `reporting.run_folder`, takes none."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

FLOCK = "hhqqi0q"  # struct flock of Linux: type, whence, start, length, pid


def is_locked(folder: Path) -> bool:
    """By another process. Not to be asked by one that holds it: closing the file would drop it."""
    path = folder / ".lock"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        asked = struct.pack(FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
        found = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return found[0] != fcntl.F_UNLCK
