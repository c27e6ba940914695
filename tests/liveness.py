"""Whether processes that tests did not start themselves have ended."""

import time
from pathlib import Path


def is_alive(pid: int) -> bool:
    """One that ended but was not waited for (a zombie) is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pid: int, seconds: float = 10) -> bool:
    """Whether it was, in time."""
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)
