"""Waiting for a model server that may still be starting, with a report on the terminal."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

from megatron_r1.rewards.remote.service import ServiceError

CONNECT_SECONDS = 5.0
"""For one attempt to connect."""
PAUSE_SECONDS = 1.0
REPORT_SECONDS = 5.0


async def wait_until_listening(
    url: str, wait_seconds: float, on_failure: Callable[[str], None], key: str = "eval.server"
) -> None:
    """Return when the host and port of `url` accept connections.

    on_failure: called with the reason after each failed attempt. key: of the recipe, for the error.
    Raises ServiceError after `wait_seconds`, which are few by default: a wrong address should show
    at once, and only the user knows how long the server takes to start.
    """
    address = urlsplit(url)
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            connecting = asyncio.open_connection(address.hostname, port)
            _, writer = await asyncio.wait_for(connecting, CONNECT_SECONDS)
            writer.close()
            return
        except TimeoutError:
            failure = f"no connection within {CONNECT_SECONDS:g} s"
        except OSError as error:  # refused, no route, no such host
            failure = error.strerror or str(error)
        on_failure(failure)
        if time.monotonic() + PAUSE_SECONDS > deadline:
            raise ServiceError(
                f"{url}: nobody answers there ({failure}). Start the server or correct "
                f"{key}.url; for a server that is still loading, raise {key}.wait_seconds, now "
                f"{wait_seconds:g}"
            )
        await asyncio.sleep(PAUSE_SECONDS)


@contextlib.asynccontextmanager
async def report_waiting(name: str, reason: Callable[[], str]) -> AsyncIterator[None]:
    """Print a line when the block begins, and one with the latest reason every few seconds. reason:
    returns "" while none is known."""

    print(f"waiting for {name}", flush=True)
    began = time.monotonic()

    async def report() -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            why = f": {reason()}" if reason() else ""
            print(f"waiting for {name}, {time.monotonic() - began:.0f} s{why}", flush=True)

    reporting = asyncio.create_task(report())
    try:
        yield
    finally:
        reporting.cancel()
