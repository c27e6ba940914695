"""One engine of a fleet: a server, its client, its load, and how its death is noticed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_r1.engines.fleet.service_stats import STATS_SECONDS, ServiceStats
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import (
    ConnectionBroken,
    EngineDied,
    EngineError,
    EngineTimeout,
)
from megatron_r1.engines.server.server import Server

T = TypeVar("T")
MakeServer = Callable[..., Server]
"""Makes a server from (model folder, log path, **engine settings): `EngineServer`, or
`placement.server_maker(pool)` for engines of engine hosts."""

DEATH_WAIT_SECONDS = 10.0
"""How long a failed request waits to see whether its engine has died: a server whose engine core
died fails its requests first and ends a moment later."""
POLL_SECONDS = 0.1
RETRY_SECONDS = 0.5


@dataclass(eq=False)
class Engine:
    """One engine of a fleet, with its load and state.

    Attributes:
        index: the second part; no other engine has the same name at the same time.
        server: the process, on this node or another.
        client: what sends requests to its address.
        num_running: sequences in flight.
        num_occupied: sequences that the dispatcher expects to be decoded.
        tokens_expected: tokens that it expects of them.
        is_up: it is not being started or replaced, so it gets every push: it holds the current
            weights, or sleeps until the next push.
        accepts_groups: it gets new groups; a draining engine gets none.
        is_asleep: it is up, and waits for weights in the next push while others serve.
        role: the first part of its name, by what the fleet is for.
        death_noticed: set when its death has been noticed.
        stats: the groups and faults of the last `STATS_SECONDS`.
    """

    index: int
    server: Server
    client: EngineClient
    num_running: int = 0
    num_occupied: float = 0.0
    tokens_expected: float = 0.0
    is_up: bool = True
    accepts_groups: bool = True
    is_asleep: bool = False
    role: str = "engine"
    death_noticed: asyncio.Event = field(default_factory=asyncio.Event)
    stats: ServiceStats = field(
        default_factory=lambda: ServiceStats(time.monotonic(), STATS_SECONDS)
    )

    @property
    def name(self) -> str:
        """The name in logs and messages, such as engine-0."""
        return f"{self.role}-{self.index}"

    async def prepare(self, policy_version: int, timeout_seconds: float) -> None:
        """Wait until the engine answers, then name its weights `policy_version`.

        Raises:
            EngineError: the server does not start in time, or refuses the version.
        """
        try:
            await self.server.wait_ready(timeout_seconds)
        except EngineError as error:
            raise EngineError(f"{self.name}: {error}") from error
        self.client.url = self.server.url  # that of a server on another node is known only now
        self.stats = ServiceStats(time.monotonic(), self.stats.window)
        await self.client.set_policy_version(policy_version)

    async def stop(self) -> None:
        """Stop the engine's processes and fail its calls; harmless if it has ended."""
        self.death_noticed.set()
        await self.client.close()
        await asyncio.to_thread(self.server.stop)

    async def await_call(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of `call`.

        Raises:
            EngineDied: the engine has died; raised at once.
            Exception: what the call raises.
        """
        if self.death_noticed.is_set():
            call.close()
            raise self.death_error()
        request = asyncio.ensure_future(call)
        death = asyncio.ensure_future(self.death_noticed.wait())
        try:
            await asyncio.wait({request, death}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                error = request.exception()
                is_late = isinstance(error, EngineTimeout)
                if not isinstance(error, EngineError) or is_late or (error.status or 500) < 500:
                    return request.result()
                # A fault, or the first sign of a death, which costs the request no attempt.
                await asyncio.wait({death}, timeout=DEATH_WAIT_SECONDS)
            if not death.done():
                return request.result()
            raise self.death_error()
        finally:
            request.cancel()
            death.cancel()
            # By `asyncio.wait`: if the request itself were awaited, its CancelledError could not
            # be told from a cancellation of the caller.
            if not request.done():
                await asyncio.wait({request})
            if not request.cancelled():
                request.exception()  # mark as retrieved

    async def await_unrepeatable_call(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call that must not be repeated, as `await_call`. An engine whose
        connection breaks during a push may hold the old weights or the new ones, or be paused, so
        it counts as dead.

        Raises:
            EngineDied: the engine died, or its connection broke.
        """
        try:
            return await self.await_call(call)
        except ConnectionBroken as broken:
            raise EngineDied(f"{self.name} was lost: {broken}") from broken

    def death_error(self) -> EngineDied:
        """Return the error for calls to this engine, which has ended."""
        return EngineDied(f"{self.name} died: {self.server.describe_end()}")

    async def drain(self, within_seconds: float) -> None:
        """Wait until no sequence is in flight, the engine has died, or the time is over."""
        deadline = time.monotonic() + within_seconds
        while self.num_running and not self.death_noticed.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)

    async def is_hanging(self, within_seconds: float) -> bool:
        """Return whether the engine is alive but its core does not answer within the time limit.

        An accepted connection of the HTTP server alone is no answer, nor is a failed connection; an
        error status is one. An engine whose death has been noticed is not hanging."""
        try:
            async with asyncio.timeout(within_seconds):
                while not self.death_noticed.is_set():
                    try:
                        await self.client.is_sleeping()
                        return False
                    except EngineError as error:
                        if error.status is not None:
                            return False
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            return True
        return False


@contextlib.asynccontextmanager
async def raise_dead_after(engine: Engine, seconds: float) -> AsyncIterator[None]:
    """Raise EngineDied if the block takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineDied(f"{engine.name} has not answered for {seconds:g} seconds") from None
