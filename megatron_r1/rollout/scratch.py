"""Where an engine's temporary files go, so that they go with it: vLLM leaves sockets and files."""

from __future__ import annotations

import os
import tempfile


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
