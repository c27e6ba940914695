"""Waiting for a model server that may still be starting, and saying so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

from megatron_r1.rewards.remote.service import ServiceError

TRY_SECONDS = 5.0
"""For one attempt to connect."""
PAUSE_SECONDS = 1.0
SAY_SECONDS = 5.0


async def wait_until_listening(
    url: str, patience: float, on_failure: Callable[[str], None], key: str = "eval.server"
) -> None:
    """Return when something accepts connections at `url`'s host and port.

    patience: seconds. on_failure: told why it could not be reached, each time. key: of the recipe,
    for the error. Raises ServiceError when that lasts longer, with the remedies: a wrong address
    should show at once, and only whoever started the server knows how long it takes to load.
    """
    place = urlsplit(url)
    port = place.port or {"http": 80, "https": 443}[place.scheme]
    began = time.monotonic()
    while True:
        try:
            connecting = asyncio.open_connection(place.hostname, port)
            _, writer = await asyncio.wait_for(connecting, TRY_SECONDS)
            writer.close()
            return
        except TimeoutError:
            failure = f"no connection within {TRY_SECONDS:g} s"
        except OSError as error:  # refused, no route, no such host
            failure = error.strerror or str(error)
        on_failure(failure)
        if time.monotonic() + PAUSE_SECONDS > began + patience:
            raise ServiceError(
                f"{url}: nobody answers there ({failure}). Start the server or correct "
                f"{key}.url; for a server that is still loading, raise {key}.wait_seconds, now "
                f"{patience:g}"
            )
        await asyncio.sleep(PAUSE_SECONDS)


@contextlib.asynccontextmanager
async def saying_what_is_waited_for(name: str, why: Callable[[], str]) -> AsyncIterator[None]:
    """While the block runs: a line at once, and another every few seconds with the latest reason.

    why: the reason, or "" where none is known yet.
    """

    async def say() -> None:
        began = time.monotonic()
        print(f"waiting for {name}", flush=True)
        while True:
            await asyncio.sleep(SAY_SECONDS)
            reason = f": {why()}" if why() else ""
            print(f"waiting for {name}, {time.monotonic() - began:.0f} s{reason}", flush=True)

    saying = asyncio.create_task(say())
    await asyncio.sleep(0)  # the first line stands there before anything blocks
    try:
        yield
    finally:
        saying.cancel()
