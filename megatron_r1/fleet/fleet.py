"""All rollout engines: one policy version everywhere, groups to whoever has room."""

from __future__ import annotations

import asyncio
import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.engine.client import EngineClient, Response
from megatron_r1.engine.errors import EngineDied, EngineError, EngineFault
from megatron_r1.fleet.engine import Engine, Feed, nothing_to_bring
from megatron_r1.fleet.launching import share_of_gpus, vocabulary
from megatron_r1.fleet.replacement import DRAIN_SECONDS, Replacement
from megatron_r1.fleet.retries import RequestRetries

UpdateInfo = Mapping[str, Any] | Sequence[Mapping[str, Any]]
NEVER_CAME = ("broke off", "have not sent all of it")
"""In the error of `receive.ReceiveBuffer` for a push that was not completed."""


class RolloutFleet:
    """Engines that hold the same weights.

    Use as `async with RolloutFleet(...) as fleet`, or call `close`. An engine that ends, hangs,
    answers nonsense or crawls is replaced while the others go on, given the current weights, and
    what it was asked for is asked for again (`repairs`). Engines may join and leave at any time. A
    push that a living engine refuses leaves the fleet refusing every call: it never serves a
    mixture of versions.
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
        role: str = "engine",
        say: Callable[[str], None] = lambda message: None,
        **server_settings: Any,
    ) -> None:
        """
        Args:
            log_folder: gets `engine-0.log`, `engine-1.log`, ..., or what the role calls them.
            max_restarts: engines replaced in all; the death after that fails its calls.
            unresponsive_seconds: an engine that has not answered for so long counts as dead.
            say: told when an engine is replaced, comes or goes.
            server_settings: of `Engine.launch` and `EngineSettings`, the same for all.

        Raises:
            ValueError: num_engines < 1.
        """
        if num_engines < 1:
            raise ValueError(f"num_engines is {num_engines}; it must be at least 1")
        self.num_engines, self.log_folder = num_engines, Path(log_folder)
        self.max_restarts = max_restarts
        self.start_timeout_seconds = start_timeout_seconds
        self.request_timeout_seconds = request_timeout_seconds
        self.unresponsive_seconds = unresponsive_seconds
        self.role, self.say = role, say
        self.server_settings = server_settings
        self.engines: list[Engine] = []
        self.version = -1
        self.awake = asyncio.Event()
        """Clear while the engines' memory is the trainer's."""
        self.awake.set()
        self.repairs = Replacement(self)
        per_copy = server_settings.get("max_num_seqs", 256)
        self.asking = RequestRetries(self, per_copy * server_settings.get("data", 1))
        self.num_pushes = 0
        self.patience = 0.0
        """While engines wait for weights within a step of theirs: seconds in which they need not
        answer."""
        self.feed: Feed = nothing_to_bring
        """What brings a new engine the others' weights (`rl.weight_bridge`)."""
        self._model: Path | None = None
        self._broken: str | None = None
        self._pushing = asyncio.Lock()
        self._starting: set[Engine] = set()
        self._joining: set[int] = set()

    async def __aenter__(self) -> RolloutFleet:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def num_restarts(self) -> int:
        return self.repairs.num_restarts

    async def start(self, model_path: str | os.PathLike[str], version: int = 0) -> None:
        """Start all engines on the weights in `model_path` and call these `version`.

        The engines end with the calling thread: call it from the main one.

        Raises:
            EngineError: one did not start; none is left running.
        """
        self._model = Path(model_path)
        try:
            for index in range(self.num_engines):
                self.engines.append(self.launch(index))
            timeout = self.start_timeout_seconds
            await asyncio.gather(*(engine.prepare(version, timeout) for engine in self.engines))
        except BaseException:
            await self.close()
            raise
        self.version = version
        self.open_changed()
        self.repairs.begin()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        n: int,
        max_tokens: int,
        kind: str = "",
        order: int = 0,
        **sampling: Any,
    ) -> list[Response]:
        """Sample a group of n responses on one engine; on another where it dies or fails.

        Args:
            kind: of question: those of one kind are expected to have responses of one length.
            order: groups with a lower one go first.
            sampling: further arguments of `EngineClient.generate`.

        Raises:
            EngineError: the call was refused, no engine could do it, or its engine died and no
                restart is left; says which, how, and what its log says.
        """
        return await self.asking.group(prompt_token_ids, n, max_tokens, kind, order, sampling)

    async def score(self, token_ids: Sequence[int], first: int, *, order: int = 0) -> array[float]:
        """The log-probabilities of token_ids[first:] at temperature 1, on one engine; on another
        where it dies or fails. order: calls with a lower one go first.

        Raises:
            EngineError: as `generate`.
        """
        return await self.asking.scores(token_ids, first, order)

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Within: engines may be silent for so long, as they wait for weights."""
        self.patience = seconds
        try:
            yield
        finally:
            self.patience = 0.0

    async def push(self, update_info: UpdateInfo, version: int) -> None:
        """Have all engines bring into use what has landed with them.

        Sequences in flight go on under the new weights; their earlier tokens keep their version. An
        engine that did not get them, or lost its connection, is replaced.

        Raises:
            ValueError: `version` is not above the current one.
            EngineError: an engine refused them, or died without a restart left; the fleet is
                unusable from then on.
        """
        self.refuse_if_broken()
        if version <= self.version:
            raise ValueError(
                f"push of version {version}, but the engines hold version {self.version}"
            )
        async with self._pushing:
            engines = [engine for engine in self.engines if engine.is_up]
            slept = not self.awake.is_set()
            try:
                if slept:
                    engines = await self._on(engines, lambda client: client.wake("weights"))
                engines = await self._on(
                    engines,
                    lambda client: client.swap_weights(update_info, version, resume=not slept),
                )
                if slept:
                    engines = await self._on(engines, lambda client: client.wake("kv_cache"))
                    await self._on(engines, lambda client: client.resume())
            except Exception as error:
                self.break_down(EngineError(f"the push of version {version} failed: {error}"))
                raise
            self.version = version
            self.num_pushes += 1
            self.awake.set()

    async def sleep(self) -> None:
        """Give the engines' memory to the trainer: weights and caches are dropped, until the next
        push brings new ones. Nothing may be in flight.

        Raises:
            EngineError: an engine refused.
        """
        self.refuse_if_broken()
        async with self._pushing:
            self.awake.clear()
            # One that starts has no weights yet: it begins anew when the memory is its own again.
            starting = [engine for engine in self._starting if not engine.is_up]
            await asyncio.gather(*(engine.end() for engine in starting))
            engines = [engine for engine in self.engines if engine.is_up]
            await self._on(engines, lambda client: client.sleep())

    async def add_engine(self) -> Engine:
        """Start one more, give it the current weights, and let it serve.

        Raises:
            EngineError: it did not start.
        """
        self.refuse_if_broken()
        # Reserved from now on: others may be joining, and none is in `engines` yet while the
        # fleet sleeps.
        taken = self._joining.union(engine.index for engine in self.engines)
        index = 1 + max(taken, default=-1)
        self._joining.add(index)
        try:
            engine = await self.start_one(index)
        finally:
            self._joining.discard(index)
        self.say(f"{engine.name} has joined: {len(self.engines)} engines")
        return engine

    async def remove_engine(self, index: int) -> None:
        """Let an engine finish what it does, at most for two minutes, and end it; the others do
        what is left.

        Raises:
            ValueError: there is no such engine, or no other.
        """
        engine = next((engine for engine in self.engines if engine.index == index), None)
        if engine is None:
            raise ValueError(f"no engine {index}; there are {[e.index for e in self.engines]}")
        if len(self.engines) == 1:
            raise ValueError(f"engine {index} is the only one; close the fleet instead")
        engine.is_open, engine.is_leaving = False, True
        self.open_changed()
        await engine.drained(DRAIN_SECONDS)
        async with self._pushing:
            self.forget(engine)  # or what is to replace it, which then finds it gone
        await engine.end()
        self.say(f"{engine.name} has left: {len(self.engines)} engines")

    def metrics(self) -> dict[str, float]:
        """For a step's line."""
        return {
            "engines/up": sum(engine.is_open for engine in self.engines),
            "engines/restarts": self.num_restarts,
            "engines/requeued": self.asking.num_requeued,
        }

    async def close(self) -> None:
        """End all engines. Safe to call more than once."""
        await self.repairs.close()
        self.asking.dispatch.fail(EngineError("the fleet was closed"))
        await asyncio.gather(*(engine.end() for engine in self.engines))
        self.engines = []

    def launch(self, index: int) -> Engine:
        """Start an engine's processes and return at once."""
        assert self._model is not None, "start() was not called"
        return Engine.launch(
            index,
            self._model,
            self.log_folder,
            self.request_timeout_seconds,
            vocab_size=vocabulary(self._model),
            role=self.role,
            **share_of_gpus(self.server_settings, index, self.num_engines),
        )

    async def start_one(self, index: int, instead_of: Engine | None = None) -> Engine:
        """Start an engine, give it the current weights, and let it serve. Where the trainer needs
        the memory before that, it begins anew afterwards.

        Raises:
            EngineError: it did not start, or refused them; or `instead_of` has left meanwhile.
        """
        while True:
            await self.awake.wait()
            try:
                engine = self.launch(index)
            except OSError as error:  # no memory for a process, no port
                raise EngineError(f"{self.role}-{index} cannot be started: {error}") from error
            engine.is_up = engine.is_open = False
            if instead_of is None:
                self.engines.append(engine)
            self._starting.add(engine)
            try:
                await self._enlist(engine, instead_of or engine)
                return engine
            except BaseException as error:
                if engine in self.engines:  # nobody has sent it away
                    self.engines.remove(engine)
                await engine.end()
                if self.awake.is_set() or not isinstance(error, EngineError):
                    raise
            finally:
                self._starting.discard(engine)

    async def _enlist(self, engine: Engine, instead_of: Engine) -> None:
        await engine.prepare(self.version, self.start_timeout_seconds)
        async with self.feed(engine):
            if instead_of not in self.engines:
                raise EngineError(f"{engine.name} is not needed any more: it has left")
            engine.is_up = engine.is_open = True
            self.engines[self.engines.index(instead_of)] = engine
        self.open_changed()

    def lose(self, engine: Engine, reason: EngineDied) -> None:
        """It can be used no more: replace it, unless that is under way. Raises `reason` when no
        restart is left."""
        self.repairs.replace(engine, reason)

    def forget(self, engine: Engine) -> None:
        """It is no longer one of the fleet's."""
        engine.is_up = engine.is_open = False
        if engine in self.engines:
            self.engines.remove(engine)
        self.open_changed()

    def open_changed(self) -> None:
        """Some engine has begun or ceased to take new groups."""
        self.asking.dispatch.serve_with(engine for engine in self.engines if engine.is_open)

    def break_down(self, reason: Exception) -> None:
        """From now on every call says why none can be answered."""
        self._broken = str(reason)
        self.asking.dispatch.fail(self._refusal())

    async def _on(self, engines: list[Engine], step: Callable[[EngineClient], Any]) -> list[Engine]:
        """Take a step of a push on each; those that are alive after it."""
        calls = (engine.unless_lost(step(engine.client)) for engine in engines)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, EngineFault) and any(w in str(outcome) for w in NEVER_CAME):
                outcome = EngineDied(f"{engine.name} did not get the weights: {outcome}")
            if isinstance(outcome, EngineDied):
                self.repairs.replace(engine, outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        return [engine for engine in engines if engine.is_up]

    def refuse_if_broken(self) -> None:
        """Raises EngineError where no call can be answered any more, or none yet."""
        if self._broken is not None:
            raise self._refusal()
        if self._model is None:
            raise EngineError("the fleet has no engines: call start() first")

    def _refusal(self) -> EngineError:
        return EngineError(f"no engine can be used; stop and resume the run: {self._broken}")
