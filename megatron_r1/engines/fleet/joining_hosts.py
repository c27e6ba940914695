"""Engine hosts that join a run while it samples."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.host_pool import HostPool
from megatron_r1.engines.server.errors import EngineError

POLL_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""The pause after an engine that could not join: the cause on its host is rarely over at once."""


@contextlib.asynccontextmanager
async def accepting_hosts(fleet: EngineFleet, pool: HostPool | None) -> AsyncIterator[None]:
    """Add an engine to the fleet whenever a host has room for one, until the end of the block."""
    task = asyncio.create_task(_add_engines(fleet, pool)) if pool is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _add_engines(fleet: EngineFleet, pool: HostPool) -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS)
        new_engines = (fleet.add_engine() for _ in range(pool.num_free))
        outcomes = await asyncio.gather(*new_engines, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, EngineError):
                fleet.state.notify(f"an engine could not join: {outcome}")
            elif isinstance(outcome, BaseException):
                raise outcome
        if not all(isinstance(outcome, Engine) for outcome in outcomes):
            await asyncio.sleep(RETRY_SECONDS)
