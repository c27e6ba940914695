"""Files that are either there in full or not there at all, whenever the process is killed."""

import os
import secrets
from pathlib import Path


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Replace `path` by `content` (text as UTF-8) so that nobody ever sees half of it.

    The content goes to a temporary name in the same folder, is fsynced, then renamed; the folder is
    fsynced too, so that the rename survives a power cut. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)
    return path


def fsync(path: str | Path) -> None:
    """Make a file's content durable, or a folder's names: a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
