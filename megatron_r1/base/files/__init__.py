"""Files: whole or absent (`r1_grading.base.files`), foreign, framed, JSON Lines, weights."""

import errno

from r1_grading.base.files import atomic_write, atomic_writer, fsync, make_folder

__all__ = ["READ_ONLY", "atomic_write", "atomic_writer", "fsync", "make_folder"]

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Numbers of errors of a place that this user may not write to; the last is that of an immutable
one (`chattr +i`)."""
