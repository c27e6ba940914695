"""Being asked to stop, by a person or by a scheduler."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM: finish the step in hand, save, end. The second ends at
    once.
    """

    requested: bool = False

    def listen(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal() -> None:
            if self.requested:
                task.cancel()
            self.requested = True

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
