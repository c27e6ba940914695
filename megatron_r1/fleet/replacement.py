"""Engines that end, hang, garble or crawl are found, and replaced while the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from megatron_r1.engine.errors import EngineDied, EngineError, EngineFault
from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.pace import find_slow

if TYPE_CHECKING:
    from megatron_r1.fleet.fleet import RolloutFleet

WATCH_SECONDS = 0.2
PROBE_SECONDS = 10.0
DRAIN_SECONDS = 120.0
"""What is in flight on an engine that is to be replaced may take so long to end; then others do it
again."""
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "can't allocate memory", "Cannot allocate memory")
"""What CUDA, PyTorch's two allocators and Linux call it. An engine that has run out does so
again."""


class Replacement:
    """Of one fleet. The last restart is used up by `max_restarts`: a death after it breaks the
    fleet, while an engine that is only slow or garbles then stays."""

    def __init__(self, fleet: RolloutFleet) -> None:
        self.fleet = fleet
        self.num_restarts = 0
        self.under_way: set[asyncio.Task[None]] = set()
        self._watching: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Watch the engines from now on."""
        self._watching = [asyncio.create_task(self._watch()), asyncio.create_task(self._probe())]

    async def close(self) -> None:
        tasks = [*self._watching, *self.under_way]
        self._watching, self.under_way = [], set()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, EngineError):
                await task

    def replace(self, engine: Engine, death: EngineError) -> None:
        """Begin to replace a dead engine, unless that is under way; raises `death` when no restart
        is left. One that was lost with its host is replaced only where no other engine is left:
        hosts that come bring engines (`rollout.placement`)."""
        if not engine.is_up:
            return
        if engine.is_leaving:
            self.fleet.forget(engine)
            return
        others = (other for other in self.fleet.engines if other is not engine)
        if engine.server.is_lost and any(other.is_up for other in others):
            self.fleet.say(f"{death}; the other engines go on without it")
            self.fleet.forget(engine)
            self._start(engine.end())
            return
        engine.is_up = engine.is_open = False
        self.fleet.open_changed()
        if self.num_restarts >= self.fleet.max_restarts:
            self.fleet.break_down(death)
            raise death
        self._start(self._revive(engine, death))

    def suspect(self, engine: Engine, fault: EngineFault) -> None:
        """An answer could not be used: the engine is replaced when that happens often, or when it
        says that it will happen again."""
        ran_out = any(words in str(fault) for words in OUT_OF_MEMORY)
        if engine.pace.failed() or ran_out:
            self.retire(engine, EngineError(f"{engine.name} cannot go on: {fault}"))

    def retire(self, engine: Engine, reason: EngineError) -> None:
        """Begin to replace an engine that still works: it gets nothing new, and what it does ends
        before, or goes to the others."""
        if engine.is_open and self.num_restarts < self.fleet.max_restarts:
            engine.is_open = False
            self.fleet.open_changed()
            self._start(self._drain_and_replace(engine, reason))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    async def _drain_and_replace(self, engine: Engine, reason: EngineError) -> None:
        await engine.drained(DRAIN_SECONDS)
        if not engine.is_up:  # it died meanwhile, or has left
            return
        if self.num_restarts < self.fleet.max_restarts:
            self.replace(engine, reason)
        else:  # others have used the last restart up
            engine.is_open = not engine.is_leaving
            self.fleet.open_changed()

    async def _revive(self, dead: Engine, reason: EngineError) -> None:
        """A new engine in the place of `dead`, with the current weights; tries again while restarts
        are left, then leaves the fleet broken."""
        fleet = self.fleet
        try:
            await dead.end()
            while self.num_restarts < fleet.max_restarts and not dead.is_leaving:
                self.num_restarts += 1
                count = f"restart {self.num_restarts} of at most {fleet.max_restarts}"
                fleet.say(f"{reason}\n{count}; its requests go to the others or wait")
                try:
                    await fleet.start_one(dead.index, instead_of=dead)
                    fleet.say(f"{dead.name} is back, with the current weights")
                    return
                except EngineError as error:
                    reason = error
            if not dead.is_leaving:
                fleet.break_down(reason)
        except Exception as error:  # nobody would ever hear of it
            fleet.break_down(error)
            raise

    async def _watch(self) -> None:
        """Notice ended engines, so that calls waiting for them fail at once."""
        while True:
            for engine in list(self.fleet.engines):
                if not engine.server.is_alive() and not engine.died.is_set():
                    engine.died.set()
                    with contextlib.suppress(EngineDied):  # the next call says so
                        self.replace(engine, engine.death())
            await asyncio.sleep(WATCH_SECONDS)

    async def _probe(self) -> None:
        """Notice engines that are alive and do nothing, or little."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            seconds = max(self.fleet.unresponsive_seconds, self.fleet.patience)
            up = [engine for engine in self.fleet.engines if engine.is_up]
            answers = await asyncio.gather(*(engine.answers(seconds) for engine in up))
            for engine, is_alive in zip(up, answers, strict=True):
                # A push may have begun while they were asked.
                if not is_alive and engine.is_up and seconds >= self.fleet.patience:
                    reason = EngineDied(f"{engine.name} has not answered for {seconds:g} seconds")
                    with contextlib.suppress(EngineDied):
                        self.replace(engine, reason)
                    engine.died.set()
            paces = {engine: engine.pace for engine in self.fleet.engines if engine.is_open}
            for engine, how in find_slow(paces, time.monotonic()).items():
                self.retire(engine, EngineError(f"{engine.name} {how}"))
