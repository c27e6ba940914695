"""The free memory of this host, or of the container that a process runs in."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Return the memory that this host, or the container, has left."""
    available_bytes = psutil.virtual_memory().available
    try:
        limit, usage = (
            int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # another system, or no limit ("max")
        return available_bytes
    # The kernel drops cached files before it kills a process.
    cached_bytes = int(stat["active_file"]) + int(stat["inactive_file"])
    return min(available_bytes, limit - usage + cached_bytes)
