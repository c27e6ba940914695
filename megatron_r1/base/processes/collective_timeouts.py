"""Whether a process ended because other ranks did not come to a collective operation in time.

gloo raises a RuntimeError then; NCCL's watchdog in torch (ProcessGroupNCCL.cpp) writes to the log
and ends the process."""

import re

TIMEOUT_KEY = "parallel.timeout_seconds"
_TIMEOUT_LIMITS = (
    re.compile(r"Timed out waiting (?P<ms>\d+)ms for"),
    re.compile(
        r"caught collective operation timeout: WorkNCCL\(.*?OpType=(?P<name>\w+).*?"
        r"Timeout\(ms\)=(?P<ms>\d+)"
    ),
)


def collective_wait(text: str, timeout_seconds: float) -> str | None:
    """Return NCCL's name of the operation that timed out, or "a collective operation" for gloo.
    None: `text` has no such error, or one of another limit than `timeout_seconds`, such as a
    push's.

    Args:
        text: the text of an error.
        timeout_seconds: the limit of the groups in question.
    """
    for pattern in _TIMEOUT_LIMITS:
        match = pattern.search(text)
        if match and int(match["ms"]) == int(timeout_seconds * 1000):
            return match.groupdict().get("name") or "a collective operation"
    return None


def timeout_remedy(timeout_seconds: float) -> str:
    """Return the limit's key and value, and when to raise it."""
    return (
        f"{TIMEOUT_KEY}: {timeout_seconds:g} is over; raise it where files or compilation take "
        "other ranks longer, else see their logs"
    )
