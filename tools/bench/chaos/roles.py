"""The processes of a run, found from outside, as `ps` would."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import psutil


def writes_to(process: psutil.Process, folder: Path) -> str | None:
    """The name of the log in `folder` that is its standard output."""
    try:
        output = Path(os.readlink(f"/proc/{process.pid}/fd/1"))
    except OSError:
        return None
    return output.name if output.parent == folder else None


class Roles:
    """Of the run that `controller` conducts; every list may be empty while a role starts."""

    def __init__(self, controller: psutil.Process, run: Path) -> None:
        self.controller, self.logs = controller, run / "logs"

    def trainer_ranks(self) -> list[psutil.Process]:
        """In order of their ranks."""
        return self._named("trainer_", leads=True)

    def engine_servers(self) -> list[psutil.Process]:
        """What answers HTTP, in order of the engines."""
        return self._named("engine-", leads=True)

    def engine_cores(self) -> list[psutil.Process]:
        """What holds the weights and generates: forked by a server."""
        return self._named("engine-", leads=False)

    def _named(self, prefix: str, leads: bool) -> list[psutil.Process]:
        """Those that began a session of their own, or of the others those that vLLM has named."""
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


def any_of(find: Callable[[], list[psutil.Process]], draw: random.Random) -> psutil.Process | None:
    """One of those there are."""
    found = find()
    return draw.choice(found) if found else None


def option(process: psutil.Process, name: str) -> str:
    """What follows `name` on its command line."""
    line = process.cmdline()
    return line[line.index(name) + 1]
