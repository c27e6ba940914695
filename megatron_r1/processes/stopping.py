"""Being asked to stop, by a person or by a scheduler."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.2
FILE = "stop"
"""In the run folder, made by whoever cannot send a signal: another host, a batch script."""


@dataclass
class StopRequest:
    """Made by the first Ctrl-C or SIGTERM, or by a file: finish the step in hand, save, end. The
    second signal ends at once.
    """

    is_signalled: bool = False
    file: Path | None = None
    say: Callable[[str], None] = lambda message: None
    """Told that the first signal was heard."""

    @property
    def requested(self) -> bool:
        return self.is_signalled or (self.file is not None and self.file.exists())

    def listen(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal() -> None:
            if self.is_signalled:
                task.cancel()
            else:
                self.is_signalled = True
                self.say("stopping when the step in hand is done; once more ends it at once")

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)

    def watch(self, folder: Path) -> None:
        """Take the file `stop` in `folder` for a request too."""
        self.file = folder / FILE

    async def before(self, work: Awaitable[Any]) -> bool:
        """Whether `work` came to its end before a stop was asked for; else it is cancelled. Raises
        what it raises."""
        task = asyncio.ensure_future(work)
        try:
            while not self.requested:
                done, _ = await asyncio.wait({task}, timeout=LOOK_SECONDS)
                if done:
                    await task
                    return True
            return False
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def done(self) -> None:
        """The request is fulfilled: the same command would continue."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
