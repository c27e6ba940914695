"""Where an engine's temporary files go, so that they go with it: vLLM leaves sockets and files, and
memory that its ranks share."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


class Scratch(tempfile.TemporaryDirectory):
    """A folder for the processes of one engine, until `cleanup`."""

    def __init__(self) -> None:
        # Short, as paths of sockets may have 107 bytes.
        super().__init__(prefix="r1_", ignore_cleanup_errors=True)

    def environment(self) -> dict[str, str]:
        """Environment variables of these processes."""
        # What torch has compiled is of use to the next engine.
        compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        return {
            "TMPDIR": self.name,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled),
        }


def shared_files(session: int) -> list[Path]:
    """In /dev/shm, what the processes of a session have mapped: queues between vLLM's ranks, whose
    names nobody chose and which stay when the ranks are killed."""
    found: set[str] = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == session:
                lines = (entry / "maps").read_text().splitlines()
                found.update(line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line)
    return [path for name in sorted(found) if (path := Path(name)).exists()]
