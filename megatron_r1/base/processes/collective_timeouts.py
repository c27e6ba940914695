"""Recognizes errors and logs of a collective operation that other ranks did not come to in time.

gloo raises a RuntimeError; NCCL's watchdog in torch (ProcessGroupNCCL.cpp) writes to the log and
ends the process."""

import re

KEY = "parallel.wait_seconds"
_LIMITS = (
    re.compile(r"Timed out waiting (?P<ms>\d+)ms for"),
    re.compile(
        r"caught collective operation timeout: WorkNCCL\(.*?OpType=(?P<name>\w+).*?"
        r"Timeout\(ms\)=(?P<ms>\d+)"
    ),
)


def waited(text: str, wait_seconds: float) -> str | None:
    """Return the operation's name in NCCL, "a collective operation" for gloo, if `text` has such an
    error, and None if not: also where the limit was another than `wait_seconds`, as of a push."""
    for pattern in _LIMITS:
        found = pattern.search(text)
        if found and int(found["ms"]) == int(wait_seconds * 1000):
            return found.groupdict().get("name") or "a collective operation"
    return None


def remedy(wait_seconds: float) -> str:
    """Return the limit's key and value, and when to raise it."""
    return (
        f"{KEY}: {wait_seconds:g} is over; raise it where files or compilation take other ranks "
        "longer, else see their logs"
    )
