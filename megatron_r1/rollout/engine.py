"""One engine of a fleet: a server, its client, and how its death is noticed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_r1.rollout.client import EngineClient
from megatron_r1.rollout.errors import EngineDied, EngineError
from megatron_r1.rollout.server import EngineServer

T = TypeVar("T")

# A server whose engine core died fails its requests first and ends a moment later.
LAST_WORDS_SECONDS = 10.0


@dataclass
class Engine:
    """num_running: sequences asked for and not yet back. is_up: whether it serves; an engine that
    is being replaced does not."""

    index: int
    server: EngineServer
    client: EngineClient
    num_running: int = 0
    is_up: bool = True
    died: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def launch(
        cls, index: int, model: Path, log_folder: Path, request_timeout: float, **settings: Any
    ) -> Engine:
        """Start its processes, which end with the calling thread, and return at once. Each engine
        samples from its own seed."""
        seed = settings.get("seed", 0) + index
        log = log_folder / f"engine-{index}.log"
        server = EngineServer(model, log, **(settings | {"seed": seed}))
        server.start()
        client = EngineClient(server.url, timeout_seconds=request_timeout)
        return cls(index, server, client)

    @property
    def name(self) -> str:
        return f"engine-{self.index}"

    async def prepare(self, version: int, timeout_seconds: float) -> None:
        """Wait until it answers; its weights are then called `version`. Raises EngineError."""
        try:
            await asyncio.to_thread(self.server.wait_ready, timeout_seconds)
        except EngineError as error:
            raise EngineError(f"{self.name}: {error}") from error
        await self.client.init_weight_transfer()
        await self.client.set_version(version)

    async def end(self) -> None:
        """Stop everything of it; harmless if it has ended."""
        self.died.set()
        await self.client.close()
        await asyncio.to_thread(self.server.stop)

    async def unless_dead(self, call: Coroutine[Any, Any, T]) -> T:
        """Await `call`; raises EngineDied as soon as the engine's process has ended."""
        request = asyncio.ensure_future(call)
        death = asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait({request, death}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                error = request.exception()
                if not isinstance(error, EngineError) or (error.status or 500) < 500:
                    return request.result()
                await asyncio.wait({death}, timeout=LAST_WORDS_SECONDS)
            if not death.done():
                return request.result()
            raise EngineDied(f"{self.name} died: {self.server.describe_end()}")
        finally:
            request.cancel()
            death.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineError):
                await request

    async def answers(self, within_seconds: float) -> bool:
        """Whether the engine core, not only the server before it, answers in time."""
        try:
            async with asyncio.timeout(within_seconds):
                await self.client.is_sleeping()
        except TimeoutError:
            return False
        except EngineError:
            pass  # an answer of a kind; a death is noticed elsewhere
        return True
