"""Who may read what a run writes: prompts, responses, weights, logs.

The umask of the controller is that of all processes it starts, ranks, engines and graders, and so
of all their files. The file of the run's secret is readable by its owner only, under any umask."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Literal

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
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & umask:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~umask)
