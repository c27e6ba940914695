"""Whether processes that tests did not start themselves have ended."""

from pathlib import Path

from waiting import wait_until


def is_alive(pid: int) -> bool:
    """One that ended but was not waited for (a zombie) is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pid: int) -> bool:
    """Wait until it is; return True."""
    wait_until(lambda: not is_alive(pid))
    return True
