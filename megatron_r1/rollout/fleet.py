"""All rollout engines: who gets which group, one policy version everywhere, dead ones replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.rollout.client import Completion, EngineClient
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.errors import EngineDied, EngineError

WATCH_SECONDS = 0.2
PROBE_SECONDS = 10.0

UpdateInfo = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class RolloutFleet:
    """N engines that hold the same weights.

    Use as `async with RolloutFleet(...) as fleet`, or call `close`. An engine that ends, or no
    longer answers, is replaced while the others go on, given the current weights, and what it was
    asked for is asked for again. A push that a living engine refuses leaves the fleet refusing
    every call: it never serves a mixture of versions.
    """

    def __init__(
        self,
        num_engines: int,
        log_folder: str | os.PathLike[str],
        *,
        max_restarts: int = 0,
        start_timeout_seconds: float = 300.0,
        request_timeout_seconds: float = 1800.0,
        unresponsive_seconds: float = 120.0,
        say: Callable[[str], None] = lambda message: None,
        **server_settings: Any,
    ) -> None:
        """
        Args:
            log_folder: gets `engine-0.log`, `engine-1.log`, ...
            max_restarts: engines replaced in all; the death after that fails its calls.
            unresponsive_seconds: an engine that has not answered for so long counts as dead.
            say: told when an engine is replaced.
            server_settings: of `EngineServer`, the same for all.

        Raises:
            ValueError: num_engines < 1.
        """
        if num_engines < 1:
            raise ValueError(f"num_engines is {num_engines}; it must be at least 1")
        self.num_engines, self.log_folder = num_engines, Path(log_folder)
        self.max_restarts, self.num_restarts = max_restarts, 0
        self.start_timeout_seconds = start_timeout_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self.unresponsive_seconds = unresponsive_seconds
        self.say = say
        self.server_settings = server_settings
        self.engines: list[Engine] = []
        self.version = -1
        self._weights: UpdateInfo | None = None
        self._model: Path | None = None
        self._broken: str | None = None
        self._pushing = asyncio.Lock()
        self._watching: list[asyncio.Task[None]] = []
        self._repairs: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RolloutFleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self, model_path: str | os.PathLike[str], version: int = 0) -> None:
        """Start all engines on the weights in `model_path` and call these `version`.

        The engines end with the calling thread: call it from the main one.

        Raises:
            EngineError: one did not start; none is left running.
        """
        self._model = Path(model_path)
        try:
            for index in range(self.num_engines):
                self.engines.append(self._launch(index))
            timeout = self.start_timeout_seconds
            await asyncio.gather(*(engine.prepare(version, timeout) for engine in self.engines))
        except BaseException:
            await self.close()
            raise
        self.version = version
        self._watching = [asyncio.create_task(self._watch()), asyncio.create_task(self._probe())]

    async def generate(
        self, prompt_token_ids: Sequence[int], *, n: int, **sampling: Any
    ) -> list[Completion]:
        """Sample a group of n responses on the least loaded engine; once more on another where it
        dies.

        Args:
            sampling: further arguments of `EngineClient.generate`.

        Raises:
            EngineError: the call failed, or its engine died and no restart is left; says which,
                how, and what its log says.
        """
        while True:
            engine = await self._least_loaded()
            engine.num_running += n
            try:
                call = engine.client.generate(prompt_token_ids, n=n, **sampling)
                return await engine.unless_dead(call)
            except EngineDied as death:
                self._replace(engine, death)
            finally:
                engine.num_running -= n

    async def push(self, update_info: UpdateInfo, version: int) -> None:
        """Give all engines new weights, which must stay readable until the next push: an engine
        that is replaced gets them too.

        Sequences in flight go on under the new weights; their earlier tokens keep their version.

        Raises:
            ValueError: `version` is not above the current one.
            EngineError: an engine refused them, or died without a restart left; the fleet is
                unusable from then on.
        """
        self._refuse_if_broken()
        if version <= self.version:
            raise ValueError(
                f"push of version {version}, but the engines hold version {self.version}"
            )
        async with self._pushing:
            engines = [engine for engine in self.engines if engine.is_up]
            try:
                for step in (
                    lambda client: client.pause("keep"),
                    lambda client: client.update_weights(update_info, version),
                    lambda client: client.resume(),
                ):
                    engines = await self._on(engines, step)
            except BaseException as error:
                self._broken = f"the push of version {version} failed: {error}"
                raise
            self.version, self._weights = version, update_info

    async def close(self) -> None:
        """End all engines. Safe to call more than once."""
        tasks = [*self._watching, *self._repairs]
        self._watching, self._repairs = [], set()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, EngineError):
                await task
        await asyncio.gather(*(engine.end() for engine in self.engines))
        self.engines = []

    def _launch(self, index: int) -> Engine:
        assert self._model is not None, "start() was not called"
        timeout = self.request_timeout_seconds
        return Engine.launch(index, self._model, self.log_folder, timeout, **self.server_settings)

    async def _least_loaded(self) -> Engine:
        """Of the engines that serve; waits for one where all are being replaced."""
        while True:
            self._refuse_if_broken()
            up = [engine for engine in self.engines if engine.is_up]
            if up:
                return min(up, key=lambda engine: engine.num_running)
            await asyncio.wait(self._repairs, return_when=asyncio.FIRST_COMPLETED)

    async def _on(self, engines: list[Engine], step: Callable[[EngineClient], Any]) -> list[Engine]:
        """Take a step of a push on each; those that are alive after it."""
        calls = (engine.unless_dead(step(engine.client)) for engine in engines)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, EngineDied):
                self._replace(engine, outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        return [engine for engine in engines if engine.is_up]

    def _replace(self, engine: Engine, death: EngineDied) -> None:
        """Begin to replace a dead engine, unless that is under way; raises `death` when no restart
        is left."""
        if not engine.is_up:
            return
        engine.is_up = False
        if self.num_restarts >= self.max_restarts:
            self._broken = str(death)
            raise death
        task = asyncio.create_task(self._revive(engine, death))
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _revive(self, dead: Engine, reason: EngineError) -> None:
        """A new engine in the place of `dead`, with the current weights; tries again while restarts
        are left, then leaves the fleet broken."""
        await dead.end()
        while self.num_restarts < self.max_restarts:
            self.num_restarts += 1
            count = f"restart {self.num_restarts} of at most {self.max_restarts}"
            self.say(f"{reason}\n{count}; its requests go to the others or wait")
            engine = self._launch(dead.index)
            try:
                await engine.prepare(self.version, self.start_timeout_seconds)
                # A push is over before these weights are chosen, or begins after they are loaded.
                async with self._pushing:
                    if self._weights is not None:
                        await engine.client.pause("keep")
                        await engine.client.update_weights(self._weights, self.version)
                        await engine.client.resume()
                    self.engines[dead.index] = engine
                return
            except EngineError as error:
                reason = error
                await engine.end()
            except BaseException:
                await engine.end()
                raise
        self._broken = str(reason)

    async def _watch(self) -> None:
        """Notice ended engines, so that calls waiting for them fail at once."""
        while True:
            for engine in self.engines:
                if not engine.server.is_alive() and not engine.died.is_set():
                    engine.died.set()
                    death = EngineDied(f"{engine.name} died: {engine.server.describe_end()}")
                    with contextlib.suppress(EngineDied):  # the next call says so
                        self._replace(engine, death)
            await asyncio.sleep(WATCH_SECONDS)

    async def _probe(self) -> None:
        """Notice engines that are alive and do nothing."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            up = [engine for engine in self.engines if engine.is_up]
            answers = await asyncio.gather(*(e.answers(self.unresponsive_seconds) for e in up))
            for engine, is_alive in zip(up, answers, strict=True):
                if not is_alive and engine.is_up:
                    seconds = self.unresponsive_seconds
                    reason = EngineDied(f"{engine.name} has not answered for {seconds:g} seconds")
                    with contextlib.suppress(EngineDied):
                        self._replace(engine, reason)
                    engine.died.set()

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise EngineError(f"no engine can be used; stop and resume the run: {self._broken}")
        if not self.engines:
            raise EngineError("the fleet has no engines: call start() first")
