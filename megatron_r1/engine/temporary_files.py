"""Temporary files of an engine, removed with it: vLLM leaves them behind."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.engine.errors import EngineError
from megatron_r1.processes.leftovers import SCRATCH_PREFIX


class Scratch(tempfile.TemporaryDirectory):
    """A temporary folder for the processes of one engine, until `cleanup`."""

    def __init__(self) -> None:
        # Short, as paths of sockets may have 107 bytes.
        super().__init__(prefix=SCRATCH_PREFIX, ignore_cleanup_errors=True)

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
