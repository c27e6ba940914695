"""How many files a process may have open."""

import resource

from megatron_r1.base.errors import Cause, UserError


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
