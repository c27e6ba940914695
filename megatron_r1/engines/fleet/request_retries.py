"""Repeats requests that fail, on other engines if there are any, until a reply is usable."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from megatron_r1.engines.fleet.dispatch import DispatchedRequest
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.fleet_state import FleetState
from megatron_r1.engines.fleet.service_stats import ServedGroup
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import EngineDied, EngineError, EngineFault

T = TypeVar("T")
OnFailure = Callable[[Engine, EngineDied | EngineFault], None]
MAX_ATTEMPTS = 5
"""More than the faults that get an engine replaced (`service_stats.MANY_FAULTS`), so that a request
also meets a fresh engine; where that fails too, the weights or the request are at fault."""


class RequestRetries:
    """Repeats failed requests.

    Args:
        state: the engines.
        on_failure: called with an engine that died or gave an unusable reply, and with the error;
            it may raise EngineDied if the fleet has failed.

    Attributes:
        num_requeued: the number of sequences that were sent again."""

    def __init__(self, state: FleetState, on_failure: OnFailure) -> None:
        self.state, self.on_failure = state, on_failure
        self.num_requeued = 0
        self._start_lock = asyncio.Lock()

    async def run(
        self,
        request: DispatchedRequest,
        call: Callable[[EngineClient], Coroutine[Any, Any, T]],
        lengths: Callable[[T], list[int]],
    ) -> T:
        """Return the first usable result of `call` on an engine.

        The death of an engine does not count as an attempt: the request did not cause it, and the
        number of restarts limits it.

        Args:
            request: what an engine is chosen for.
            call: makes the request.
            lengths: returns the number of tokens of each sequence in a result.

        Raises:
            EngineError: if an engine refuses the call, if MAX_ATTEMPTS replies are unusable, or if
                no engine is left."""
        dispatcher = self.state.dispatcher
        faults: list[EngineFault] = []
        while len(faults) < MAX_ATTEMPTS:
            self.state.require_usable()
            engine = await dispatcher.acquire(request)
            started_at = time.monotonic()
            try:
                # One request in a turn of the event loop: to start 512 at once takes 0.3 s, in
                # which nothing else runs.
                async with self._start_lock:
                    await asyncio.sleep(0)
                result = await engine.await_call(call(engine.client))
            except (EngineDied, EngineFault) as failure:
                request.avoid.add(engine)
                self.num_requeued += request.num_sequences
                if isinstance(failure, EngineFault):
                    faults.append(failure)
                # If the fleet has failed, `require_usable` raises its error, which has the cause.
                with contextlib.suppress(EngineDied):
                    self.on_failure(engine, failure)
                continue
            finally:
                dispatcher.release(engine, request)
            end, tokens = time.monotonic(), lengths(result)
            engine.stats.add(ServedGroup(end, end - started_at, sum(tokens), max(tokens)))
            return result
        raise EngineError(f"{MAX_ATTEMPTS} times in a row no answer could be used: {faults[-1]}")
