"""What eval and sample have in common: a folder of answers, and an end by Ctrl-C or a scheduler."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from megatron_r1.config import Config
from megatron_r1.reporting.run_folder import RunFolder


def run_in_folder(
    config: Config, what: str, body: Callable[[RunFolder], Coroutine[Any, Any, None]]
) -> None:
    """Run `body` with run.folder locked. what: is written into it, for the error.

    Raises ValueError where it is a training run's, KeyboardInterrupt when asked to stop.
    """
    folder = RunFolder(config.run.folder)
    if folder.metrics_path.exists() or folder.checkpoints.exists():
        raise ValueError(
            f"run.folder {folder.path} is that of a training run: give {what} a folder of its own, "
            "and the run as model.path"
        )
    with folder:
        try:
            asyncio.run(_stoppable(body(folder)))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _stoppable(body: Coroutine[Any, Any, None]) -> None:
    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await body
