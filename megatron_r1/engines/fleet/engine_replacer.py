"""How a fleet goes on where engines fail: those that end, hang, crawl or reply nonsense are found
and replaced while the others go on."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.fleet_state import FleetState
from megatron_r1.engines.fleet.service_stats import find_slow
from megatron_r1.engines.server.errors import (
    EngineDied,
    EngineError,
    EngineFault,
    WeightsUnavailable,
)

WATCH_SECONDS = 0.2
LIVENESS_CHECK_SECONDS = 10.0
DRAIN_SECONDS = 120.0
"""Time for requests in flight on an engine that is to be replaced; then others repeat them."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
"""Pauses between starts of an engine for which no weights are there: the first one, which doubles
to the longest one. Without them engines would be started one after another while a trainer is
down."""
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "can't allocate memory", "Cannot allocate memory")
"""The messages of CUDA, PyTorch's two allocators and Linux. An engine that has run out of memory
will do so again."""


class EngineReplacer:
    """Replaces engines until `max_restarts` are used up. After that the death of an engine fails
    the fleet, and an engine that is only slow or faulty stays.

    Attributes:
        tasks: the replacements under way.
        grace_seconds: how long engines may be silent while they wait for weights."""

    def __init__(
        self,
        state: FleetState,
        start_replacement: Callable[[Engine], Awaitable[object]],
        max_restarts: int,
        unresponsive_seconds: float,
    ) -> None:
        """Prepare to replace the engines of a fleet.

        Args:
            state: the fleet's engines.
            start_replacement: starts an engine in the place of a dead one and gives it the current
                weights, or raises EngineError.
            max_restarts: how many engines may be replaced.
            unresponsive_seconds: an engine that has not answered for this time counts as dead."""
        self.state, self.start_replacement = state, start_replacement
        self.max_restarts, self.unresponsive_seconds = max_restarts, unresponsive_seconds
        self.grace_seconds = 0.0
        self.num_restarts = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self._watching: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Watch the engines from now on."""
        self._watching = [
            asyncio.create_task(self._watch_engines()),
            asyncio.create_task(self._check_liveness()),
        ]

    async def close(self) -> None:
        """Cancel watching and restarts that are under way."""
        tasks = [*self._watching, *self.tasks]
        self._watching, self.tasks = [], set()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, EngineError):
                await task

    def handle_failure(self, engine: Engine, failure: EngineDied | EngineFault) -> None:
        """Replace an engine after a failed request, if it has to be.

        At once if it died; after its other requests if it ran out of memory, or if too many of its
        last replies were unusable.

        Raises:
            EngineError: the engine died and no restart is left.
        """
        if isinstance(failure, EngineDied):
            self.replace(engine, failure)
            return
        ran_out = any(words in str(failure) for words in OUT_OF_MEMORY)
        if engine.stats.add_fault() or ran_out:
            self.retire(engine, EngineError(f"{engine.name} cannot go on: {failure}"))

    def replace(self, engine: Engine, death: EngineError) -> None:
        """Begin to replace a dead engine, unless it is being replaced already.

        An engine that was lost with its host is replaced only if it was the last one: when a host
        joins, `joining_hosts.accepting_hosts` adds an engine, which costs no restart.

        Raises:
            EngineError: `death`, where no restart is left.
        """
        if not engine.is_up:
            return
        if engine.server.is_lost and any(up_engine is not engine for up_engine in self.state.up):
            self.state.notify(f"{death}; the other engines go on without it")
            self.state.remove(engine)
            self._start_task(engine.stop())
            return
        self.state.mark_down(engine)
        if self.num_restarts >= self.max_restarts:
            self.state.fail(death)
            raise death
        self._start_task(self._restart_engine(engine, death))

    def retire(self, engine: Engine, reason: EngineError) -> None:
        """Begin to replace an engine that still works, if restarts are left. The engine gets no new
        groups, and is replaced once those in flight are back, or after DRAIN_SECONDS."""
        if engine.accepts_groups and self.num_restarts < self.max_restarts:
            self.state.set_accepts_groups(engine, False)
            self._start_task(self._drain_and_replace(engine, reason))

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _drain_and_replace(self, engine: Engine, reason: EngineError) -> None:
        await engine.drain(DRAIN_SECONDS)
        if not engine.is_up:  # it died meanwhile and is being replaced, or has left
            return
        if self.num_restarts < self.max_restarts:
            self.replace(engine, reason)
        else:  # others have used up the last restart, so it serves on
            self.state.set_accepts_groups(engine, True)

    async def _restart_engine(self, dead: Engine, reason: EngineError) -> None:
        """Start a replacement; if it does not start, try again while restarts are left, and then
        fail the fleet. A start for which the trainer has no weights costs no restart."""
        pause_seconds = FIRST_PAUSE_SECONDS
        try:
            await dead.stop()
            while self.num_restarts < self.max_restarts:
                self.num_restarts += 1
                count = f"restart {self.num_restarts} of at most {self.max_restarts}"
                self.state.notify(f"{reason}\n{count}; its requests go to the others or wait")
                try:
                    await self.start_replacement(dead)
                    self.state.notify(f"{dead.name} is back, with the current weights")
                    return
                except WeightsUnavailable as error:
                    self.num_restarts -= 1  # a trainer that starts takes longer than many engines
                    reason = error
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, MAX_PAUSE_SECONDS)
                except EngineError as error:
                    reason = error
            self.state.fail(reason)
        except Exception as error:  # the task's own exception is not awaited before `close`
            self.state.fail(error)
            raise

    async def _watch_engines(self) -> None:
        """Find ended engines, so that calls waiting for them fail at once."""
        while True:
            for engine in list(self.state.engines):
                if not engine.server.is_alive() and not engine.death_noticed.is_set():
                    engine.death_noticed.set()
                    with contextlib.suppress(EngineDied):  # the next call raises it
                        self.replace(engine, engine.death_error())
            await asyncio.sleep(WATCH_SECONDS)

    async def _check_liveness(self) -> None:
        """Find engines that are alive and do nothing, or little."""
        while True:
            await asyncio.sleep(LIVENESS_CHECK_SECONDS)
            seconds = max(self.unresponsive_seconds, self.grace_seconds)
            running_engines = self.state.up
            are_hanging = await asyncio.gather(
                *(engine.is_hanging(seconds) for engine in running_engines)
            )
            for engine, is_hanging in zip(running_engines, are_hanging, strict=True):
                # A push may have begun since `seconds` was computed.
                if is_hanging and engine.is_up and seconds >= self.grace_seconds:
                    reason = EngineDied(f"{engine.name} has not answered for {seconds:g} seconds")
                    with contextlib.suppress(EngineDied):
                        self.replace(engine, reason)
                    # Its calls fail now: a process that hangs ends none of them.
                    engine.death_noticed.set()
            stats_by_engine = {
                engine: engine.stats for engine in self.state.engines if engine.accepts_groups
            }
            for engine, slowness in find_slow(stats_by_engine, time.monotonic()).items():
                self.retire(engine, EngineError(f"{engine.name} {slowness}"))
