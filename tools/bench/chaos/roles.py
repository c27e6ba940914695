"""The processes of a run, found from outside as `ps` finds them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def writes_to(process: psutil.Process, folder: Path) -> str | None:
    """Return the name of the log in `folder` that is its standard output, or None."""
    try:
        output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
    except OSError:
        return None
    return output.name if output.parent == folder else None


class Roles:
    """The processes under `controller`; every list may be empty while a role starts."""

    def __init__(self, controller: psutil.Process, run: Path) -> None:
        self.controller, self.logs = controller, run / "logs"

    def trainer_ranks(self) -> list[psutil.Process]:
        """Return them in order of their ranks."""
        return self._named("trainer_", leads=True)

    def engine_servers(self) -> list[psutil.Process]:
        """Return the HTTP servers, in order of the engines."""
        return self._named("engine-", leads=True)

    def engine_cores(self) -> list[psutil.Process]:
        """Return the processes that hold the weights and generate, forked by a server."""
        return self._named("engine-", leads=False)

    def _named(self, prefix: str, leads: bool) -> list[psutil.Process]:
        """Return session leaders (leads), or else the processes named by vLLM."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            for process in self.controller.children(recursive=True):
                name = writes_to(process, self.logs)
                if name is None or not name.startswith(prefix):
                    continue
                is_leader = os.getsid(process.pid) == process.pid
                if leads if is_leader else not leads and process.name().startswith("VLLM::"):
                    found.append((name, process.pid, process))
        return [process for _, _, process in sorted(found)]
