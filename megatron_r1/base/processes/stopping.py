"""Requests to stop a run, by a person or by a scheduler."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2
STOP_FILE = "stop"
"""Created in the run folder where no signal can be sent: from another host, or by a batch
script."""


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM, or by a file: finish the current step, save, end. The
    second signal ends the run at once.

    Attributes:
        is_signalled: whether a signal has come.
        file: the file `stop`; None: it is not watched.
        notify: gets a line when the first signal arrives."""

    is_signalled: bool = False
    file: Path | None = None
    notify: Callable[[str], None] = lambda message: None

    @property
    def is_requested(self) -> bool:
        """Whether a signal has come or the file `stop` is there."""
        return self.is_signalled or (self.file is not None and self.file.exists())

    def listen(self) -> None:
        """Handle signals from now on; the second one cancels the calling task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal() -> None:
            if self.is_signalled:
                task.cancel()
            else:
                self.is_signalled = True
                self.notify("stopping when the step in hand is done; once more ends it at once")

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)

    def watch(self, folder: Path) -> None:
        """Also count the file `stop` in `folder` as a request."""
        self.file = folder / STOP_FILE

    async def finished_before_stop(self, work: Awaitable[Any]) -> bool:
        """Await `work` and return True, or cancel it and return False when a stop is requested
        first.

        Raises:
            Exception: what `work` raises.
        """
        task = asyncio.ensure_future(work)
        try:
            while not self.is_requested:
                done_tasks, _ = await asyncio.wait({task}, timeout=POLL_SECONDS)
                if done_tasks:
                    await task
                    return True
            return False
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def clear(self) -> None:
        """Remove the file, after which the same command continues the run."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def run_until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run the coroutine that calls `StopRequest.listen`.

    Raises:
        KeyboardInterrupt: the second signal has ended it.
        Exception: what the coroutine raises.
    """
    try:
        asyncio.run(work)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
