"""Files that are complete or absent, even if the process is killed at any time, and who may read
what a run writes: prompts, responses, weights, logs.

The umask of the controller is that of all processes it starts, ranks, engines and graders, and so
of all their files. Secrets (`token`) are their owner's whatever it is."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of errors of a place that this user may not write to; the last is that of an immutable
one (`chattr +i`)."""


def atomic_write(
    path: str | Path, content: str | bytes, *, mode: int = 0o666, durable: bool = True
) -> Path:
    """Replace `path` by `content` (text as UTF-8) so that no reader ever sees half of it. The other
    arguments are those of `atomic_writer`."""
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
        path: of the finished file.
        mode: permissions from the start, less the umask.
        durable: fsync the content before the rename, and the folder after it, so that both survive
            a power cut, as do the folders created.
    """
    path = Path(path)
    if durable:
        make_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, unless it exists; those created survive a power
    cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync(folder.parent)


def fsync(path: str | Path) -> None:
    """Make a file's content durable, or a folder's names: a rename is on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Readers = Literal["owner", "group", "everyone"]
"""Who may read a run's files; only their owner may write them."""
_UMASKS = {"owner": 0o077, "group": 0o027, "everyone": 0o022}


def allow_readers(readers: Readers) -> None:
    """Let `readers` read the files that this process and its children write from now on."""
    os.umask(_UMASKS[readers])


def allow_readers_as(folder: Path) -> None:
    """Let those read this process's files who may read an existing folder."""
    with contextlib.suppress(FileNotFoundError):
        os.umask(0o777 & ~folder.stat().st_mode)


def narrow_readers(folder: Path) -> None:
    """Take from an existing folder the permissions that the umask would not have given it, where it
    is this user's: nothing below it can be read by others then."""
    umask = os.umask(0o077)
    os.umask(umask)
    found = folder.stat()
    if found.st_uid == os.geteuid() and found.st_mode & umask:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~umask)
