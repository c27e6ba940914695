"""Temporary logs of engines."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.engines.server.errors import EngineError


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
