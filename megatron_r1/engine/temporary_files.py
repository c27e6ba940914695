"""Temporary files and shared memory of an engine, removed with it: vLLM leaves both behind."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.engine.errors import EngineError
from megatron_r1.processes.inspection import session_members


class Scratch(tempfile.TemporaryDirectory):
    """A temporary folder for the processes of one engine, until `cleanup`."""

    def __init__(self) -> None:
        # Short, as paths of sockets may have 107 bytes.
        super().__init__(prefix="r1_", ignore_cleanup_errors=True)

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make these processes use the folder."""
        # Compiled kernels stay outside, for the next engine to use.
        compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        return {
            "TMPDIR": self.name,
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled),
        }


@contextlib.contextmanager
def temporary_logs() -> Iterator[Path]:
    """Provide a temporary folder for the logs of engines. It stays where an engine fails, whose
    error names its log."""
    folder = Path(tempfile.mkdtemp(prefix="megatron_r1_logs_"))
    failed = False
    try:
        yield folder
    except EngineError:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


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
