"""Files that are complete or absent, even if the process is killed at any time."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def atomic_write(
    path: str | Path, content: str | bytes, *, mode: int = 0o666, durable: bool = True
) -> Path:
    """Replace a file's content so that no reader ever sees half of it; return its path.

    Args:
        path: the file to write; what was there is replaced.
        content: bytes, or text that is written as UTF-8.
        mode: permissions from the start, less the umask.
        durable: whether the file survives a power cut, as in `atomic_writer`."""
    with atomic_writer(path, mode=mode, durable=durable) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def atomic_writer(
    path: str | Path, *, mode: int = 0o666, durable: bool = True
) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` at the end of the block, or is deleted where that raises.

    The content goes to a temporary name in the same folder and is renamed. Missing parent folders
    are created.

    Args:
        path: the file to write; what was there is replaced.
        mode: permissions from the start, less the umask.
        durable: fsync the content before the rename, and the folder after it, so that both survive
            a power cut, as do the folders created."""
    path = Path(path)
    if durable:
        make_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(
            temporary_path, "xb", opener=lambda name, flags: os.open(name, flags, mode)
        ) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, unless it exists.

    Those created survive a power cut."""
    missing_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing_folders):
        fsync(folder.parent)


def fsync(path: str | Path) -> None:
    """Make a file's content durable, or a folder's names: a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
