"""Being asked to stop, by a person or by a scheduler."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass
from pathlib import Path

FILE = "stop"
"""In the run folder, made by whoever cannot send a signal: another host, a batch script."""


@dataclass
class StopRequest:
    """Made by the first Ctrl-C or SIGTERM, or by a file: finish the step in hand, save, end. The
    second signal ends at once.
    """

    is_signalled: bool = False
    file: Path | None = None

    @property
    def requested(self) -> bool:
        return self.is_signalled or (self.file is not None and self.file.exists())

    def listen(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal() -> None:
            if self.is_signalled:
                task.cancel()
            self.is_signalled = True

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)

    def watch(self, folder: Path) -> None:
        """Take the file `stop` in `folder` for a request too."""
        self.file = folder / FILE

    def done(self) -> None:
        """The request is fulfilled: the same command would continue."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
