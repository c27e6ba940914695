"""Waiting for what a test's processes and tasks do, without a deadline.

How long that takes depends on the machine. What never happens is ended by the watchdog of
`conftest.py`, which sees that a test neither computes nor waits for a core."""

import asyncio
import time
from collections.abc import Callable

PATIENT = 3600.0
"""Seconds, for a time limit of the product that a test has to give and honest work must not hit."""


def wait_until(condition: Callable[[], object], pause_seconds: float = 0.02) -> None:
    """Return when condition() is true."""
    while not condition():
        time.sleep(pause_seconds)


async def until(condition: Callable[[], object], pause_seconds: float = 0.01) -> None:
    """Return when condition() is true, while other tasks of the event loop run."""
    while not condition():
        await asyncio.sleep(pause_seconds)
