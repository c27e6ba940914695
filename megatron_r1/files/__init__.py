"""Files that are either there in full or not there at all, whenever the process is killed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Replace `path` by `content` (text as UTF-8) so that nobody ever sees half of it."""
    with atomic_writer(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` at the end of the block, or nothing at all where that raises.

    The content goes to a temporary name in the same folder, is fsynced, then renamed; the folder is
    fsynced too, so that the rename survives a power cut. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: str | Path) -> None:
    """Make a file's content durable, or a folder's names: a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
