"""Files that are complete or absent (`r1_grading.base.files`), who may read what a run writes
(prompts, responses, weights, logs), blocks that distinguish a large file from others, and how many
files a process may have open.

The umask of the controller is that of all processes it starts, ranks, engines and graders, and so
of all their files. The file of the run's secret is readable by its owner only, under any umask."""

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from r1_grading.base.files import atomic_write, atomic_writer, fsync, make_folder

from megatron_r1.base.errors import Cause, UserError

__all__ = [
    "BLOCK_BYTES",
    "READ_ONLY",
    "Readers",
    "allow_open_files",
    "allow_readers",
    "allow_readers_as",
    "atomic_write",
    "atomic_writer",
    "fsync",
    "make_folder",
    "narrow_readers",
    "sample_blocks",
]

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of errors of a place that this user may not write to; the last is that of an immutable
one (`chattr +i`)."""

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


BLOCK_BYTES = 65_536


def sample_blocks(path: Path, num_blocks: int) -> Iterator[bytes]:
    """Yield blocks of a file at equal distances, from its first to its last bytes. Of a file
    smaller than a block each one is the whole content.

    Args:
        path: the file.
        num_blocks: how many blocks of `BLOCK_BYTES` are read, at least 2."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for block in range(num_blocks):
            file.seek(block * max(0, size - BLOCK_BYTES) // (num_blocks - 1))
            yield file.read(BLOCK_BYTES)


def allow_open_files(needed: int, reason: str) -> None:
    """Raise this process's soft limit to `needed`, if it is lower.

    Args:
        needed: open files.
        reason: what needs so many.

    Raises:
        UserError: where the hard limit does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{reason}: {needed:,} open files, and this process may have {hard:,}; raise the limit "
            f"(ulimit -Hn {needed}, or LimitNOFILE of the service that starts it)",
            key="ulimit -n",
            cause=Cause.TOO_LARGE,
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
