"""What killed processes leave behind: files in shared memory and temporary folders."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from megatron_r1.processes.inspection import session_members

SCRATCH_PREFIX = "r1_"
"""How the name of a temporary folder begins that belongs to one process and those under it. Short,
as paths of sockets may have 107 bytes."""


class Scratch(tempfile.TemporaryDirectory):
    """A temporary folder for one process and those under it, until `cleanup`."""

    def __init__(self) -> None:
        super().__init__(prefix=SCRATCH_PREFIX, ignore_cleanup_errors=True)

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make these processes use the folder."""
        # Compiled kernels stay outside, for the next engine to use.
        compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        return {
            "TMPDIR": self.name,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled),
        }


def shared_files(session: int) -> list[Path]:
    """Return the files in /dev/shm that processes of a session have mapped: queues between vLLM's
    ranks, whose names are random and which stay when the ranks are killed."""
    mapped: set[str] = set()
    for pid in session_members(session):
        # psutil's memory_maps reads smaps instead, which walks every page of the process.
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped.update(line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line)
    return [path for name in sorted(mapped) if (path := Path(name)).exists()]


def remove_scratch(folder: Path) -> None:
    """Delete a temporary folder if its name says that it belongs to one process."""
    if folder.name.startswith(SCRATCH_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
