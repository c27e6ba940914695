"""How many files a process may have open."""

import resource

from megatron_r1.base.errors import Cause, UserError


def allow_open_files(count: int, reason: str) -> None:
    """Raise this process's soft limit to `count`, if it is lower.

    Args:
        count: open files.
        reason: what needs so many.

    Raises:
        UserError: where the hard limit does not allow it.
    """
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit == resource.RLIM_INFINITY or soft_limit >= count:
        return
    if hard_limit != resource.RLIM_INFINITY and hard_limit < count:
        raise UserError(
            f"{reason}: {count:,} open files, and this process may have {hard_limit:,}; raise the "
            f"limit (ulimit -Hn {count}, or LimitNOFILE of the service that starts it)",
            key="ulimit -n",
            cause=Cause.TOO_LARGE,
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard_limit))
