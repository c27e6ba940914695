"""A disk that can be filled: a small tmpfs, where that may be mounted."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

BALLAST = "ballast"
CHUNK = 64 * 1024


def may_mount() -> bool:
    return os.geteuid() == 0


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """`folder` on a disk of its own, empty; a plain folder where nothing may be mounted."""
    folder.mkdir(parents=True)
    if not may_mount():
        yield folder
        return
    size = f"size={mebibytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path) -> None:
    """Until not one byte more fits."""
    descriptor = os.open(folder / BALLAST, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size = CHUNK
    while size:
        try:
            os.write(descriptor, b"\0" * size)
        except OSError:
            size //= 2
    os.close(descriptor)


def make_room(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)
