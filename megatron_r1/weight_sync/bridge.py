"""From the trainer's weights to the engines': who is connected, one push after another, proof.

A push first lands beside the weights that an engine generates with; the engines pause only while
what has landed is brought into use. Then each answers a few prompts, and the trainer must find the
same log-probabilities.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from megatron_r1.config import Config
from megatron_r1.config.push import PushConfig
from megatron_r1.engine.client import Response
from megatron_r1.engine.errors import EngineDied, EngineError, EngineFault
from megatron_r1.errors import TrainerError
from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.fleet import RolloutFleet
from megatron_r1.fleet.placement import hosts_address
from megatron_r1.models import read_hf_config
from megatron_r1.weight_sync.plan.fp8_blocks import pushed_tensors
from megatron_r1.weight_sync.plan.recipe import engine_layout

PROBE_TOKENS = 8
CONNECT_SECONDS = 120.0
"""For the ranks of an engine and of the trainer to find each other; an engine that dies meanwhile
is waited for so long."""
EXACT_TOLERANCE, TOLERANCE = 1e-3, 0.3
"""Of probes where both sides compute in float32, and else. In float32 about 1e-6 is seen, in
bfloat16 0.01 to 0.05 (an expert chosen otherwise); weights of another version give more than 1."""


class Trainer(Protocol):
    """The methods of `TrainerClient` that a bridge uses."""

    async def probe(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]]
    ) -> float: ...

    async def call_all(
        self, operation: str, *, begun: Callable[[], object] | None = None, **arguments: Any
    ) -> list[dict[str, Any]]: ...


def weight_bridge(
    config: Config, trainer: Trainer, fleet: RolloutFleet, probes: Sequence[Sequence[int]]
) -> WeightBridge:
    """The bridge of a run; probes: prompts' token ids."""
    fp8 = config.push.fp8
    elsewhere = config.rollout.placement == "hosts"
    is_exact = config.model.dtype == config.rollout.dtype == "float32" and not fp8
    return WeightBridge(
        trainer,
        fleet,
        config.push,
        pushed_tensors(read_hf_config(config.model.path), fp8=fp8),
        asdict(replace(engine_layout(config), engines=1)),
        probes,
        config.push.probe_tolerance or (EXACT_TOLERANCE if is_exact else TOLERANCE),
        # Ranks that the controller has started meet at 127.0.0.1, which is no address elsewhere.
        store_host=hosts_address(config.rollout) if elsewhere else None,
    )


Lose = Callable[[Engine, EngineDied], None]
"""What is to be done about an engine that can be used no more."""


def _refuse(engine: Engine, death: EngineDied) -> None:
    """One that is not the fleet's yet must not become it."""
    raise death


async def _join(task: asyncio.Task[None]) -> None:
    await task


def _say_gone(store: Sequence[Any], engine: str) -> None:
    # Brings torch, which no controller has needed so far: seconds, and only then.
    from megatron_r1.weight_sync.receive.rendezvous import say_gone

    say_gone(*store, engine)


class WeightBridge:
    """Of one trainer: `open` once, then `hold` before its weights change and `push` after.

    Used as the fleet's `feed`: an engine that is replaced, or joins, is brought the trainer's
    weights while these are what the others have.
    """

    def __init__(
        self,
        trainer: Trainer,
        fleet: RolloutFleet,
        settings: PushConfig,
        tensors: Sequence[tuple[str, Sequence[int]]],
        layout: dict[str, Any],
        probes: Sequence[Sequence[int]] = (),
        tolerance: float = 1e-3,
        store_host: str | None = None,
    ):
        """tensors: name and shape of what a checkpoint of the model holds. layout: of an engine
        (`weights.push.EngineLayout`'s fields). probes: prompts' token ids. tolerance: of the mean
        difference of log-probabilities. store_host: under which engines reach the host of trainer
        rank 0; None: as the ranks do."""
        self.trainer, self.fleet, self.settings = trainer, fleet, settings
        self.tensors = [[name, list(shape)] for name, shape in tensors]
        self.layout, self.probes, self.tolerance = layout, probes, tolerance
        self.store_host = store_host
        self._store: list = []
        self._settled = asyncio.Lock()
        self._is_held = False
        """Whether the lock is `open`'s or `hold`'s, and not a feeder's."""
        self._number = 0
        self._connections = 0
        self._connected: dict[int, str] = {}
        """Engines that trainer ranks keep something of, and what they call each."""
        self._windows = 1
        self._version: int | None = None
        self._is_closed = False

    async def open(self) -> None:
        """Connect trainer and engines; the first push is to follow. Raises EngineError."""
        await self._settled.acquire()
        self._is_held = True
        (first, *_) = await self.trainer.call_all("open_push")
        host, port = first["store"]
        self._store = [self.store_host or host, port]
        self.fleet.feed = self.feed
        with self.fleet.patient(self._connect_seconds):
            for engine in [engine for engine in self.fleet.engines if engine.is_up]:
                try:
                    await engine.unless_lost(self._connect(engine))
                except EngineDied as death:
                    self.fleet.lose(engine, death)

    async def hold(self) -> None:
        """The trainer's weights are about to change: until the next push nobody is brought them."""
        if self._version is not None:
            await self._settled.acquire()
            self._is_held, self._version = True, None

    async def push(self, version: int) -> dict[str, float]:
        """The trainer's present weights become `version` on every engine: how that went.

        Raises:
            EngineError: they did not arrive as they were sent, or an engine computes something else
                with them than the trainer.
        """
        assert self._settled.locked(), "open() or hold() comes first"
        start = time.perf_counter()
        engines = [engine for engine in self.fleet.engines if engine.is_up]
        self._number += 1
        gone = sorted(self._connected.keys() - {engine.index for engine in self.fleet.engines})
        for index in gone:
            del self._connected[index]
        sending = asyncio.create_task(self._send(engines, self.fleet.lose, gone))
        if self._windows == 1:
            await sending
        staged = time.perf_counter()
        # With several windows an engine waits for most of the weights while it brings them in, and
        # the trainer for the slowest engine, so that all of them wait for one that has died.
        waits = self.settings.timeout_seconds if self._windows > 1 else 0.0
        try:
            with self.fleet.patient(waits), self._telling_of_deaths(engines):
                async with asyncio.TaskGroup() as both:
                    both.create_task(self.fleet.push(self._update(), version))
                    both.create_task(_join(sending))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        live = time.perf_counter()
        left = [engine for engine in engines if engine.is_up]
        proof = await self._prove(left, self.fleet.lose)
        self._version = version
        self._release()
        return {"push/transfer": staged - start, "push/pause": live - staged, **proof}

    @contextlib.contextmanager
    def _telling_of_deaths(self, engines: Sequence[Engine]) -> Iterator[None]:
        """Meanwhile the trainer hears at once of engines that die, where it may wait for them."""
        telling = [
            asyncio.create_task(self._tell_of_death(engine))
            for engine in engines
            if self._windows > 1
        ]
        try:
            yield
        finally:
            for task in telling:
                task.cancel()

    async def _tell_of_death(self, engine: Engine) -> None:
        await engine.died.wait()
        await self._tell_gone(engine)

    async def _tell_gone(self, engine: Engine) -> None:
        with contextlib.suppress(RuntimeError):  # the trainer is gone as well
            await asyncio.to_thread(_say_gone, self._store, self._connected[engine.index])

    @contextlib.asynccontextmanager
    async def feed(self, engine: Engine) -> AsyncIterator[None]:
        """Bring `engine`, which is none of the fleet's yet, what the others have; no push begins
        within. Waits while the trainer's weights are between two versions."""
        async with self._settled:
            if self._is_closed:
                raise EngineError(f"{engine.name}: the trainer that had weights for it is gone")
            try:
                await self._bring(engine)
            except TrainerError as error:  # the session hears of it as well, and may mend it
                raise EngineError(f"{engine.name}: no weights for it: {error}") from error
            yield

    async def _bring(self, engine: Engine) -> None:
        await engine.unless_dead(self._connect(engine))
        # With the others' last number: pushes to an engine are numbered without gaps.
        sending = asyncio.create_task(self._send([engine], _refuse))
        if self._windows == 1:
            await sending
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._bring_in(engine))
                both.create_task(_join(sending))
        except ExceptionGroup as failures:
            if self._windows > 1:
                await self._tell_gone(engine)
            raise failures.exceptions[0] from None
        await self._prove([engine], _refuse)

    async def _bring_in(self, engine: Engine) -> None:
        # Nobody watches an engine that is not the fleet's yet, and the next push waits for it.
        async with self._in_time(engine):
            await engine.client.swap_weights(self._update(), self._version)

    @contextlib.asynccontextmanager
    async def _in_time(self, engine: Engine) -> AsyncIterator[None]:
        seconds = self.settings.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise EngineDied(f"{engine.name} has not answered for {seconds:g} seconds") from None

    def _release(self) -> None:
        if self._is_held:
            self._is_held = False
            self._settled.release()

    def close(self) -> None:
        """Its trainer is gone, or going: whoever waits for weights is told so."""
        self._is_closed = True
        self._release()

    @property
    def _connect_seconds(self) -> float:
        return min(CONNECT_SECONDS, self.settings.timeout_seconds)

    async def _connect(self, engine: Engine) -> None:
        self._connections += 1
        name = f"{engine.name}.{self._connections}.{self._store[1]}"
        self._connected[engine.index] = name
        seconds = self._connect_seconds
        memory = self.settings.memory_gib
        init = {
            "store": self._store,
            "engine": name,
            "tensors": self.tensors,
            "memory_bytes": memory and int(memory * 2**30),
            "timeout_seconds": seconds,
            "push_seconds": self.settings.timeout_seconds,
        }
        receiving: asyncio.Task[None] | None = None

        def receive() -> None:
            nonlocal receiving
            receiving = asyncio.create_task(engine.client.init_weight_transfer(init))

        try:
            # The engine's clock begins with the trainer's turn, which may be computing for long. An
            # engine's ranks that cannot take part tell the trainer's so in the store.
            answers = await self.trainer.call_all(
                "connect_engine",
                begun=receive,
                engine=engine.index,
                name=name,
                layout=self.layout,
                transport=self.settings.transport,
                timeout_seconds=seconds,
                push_seconds=self.settings.timeout_seconds,
                full_every=self.settings.full_every if self.settings.delta else 1,
            )
            if receiving and not any("problem" in answer for answer in answers):
                async with self._in_time(engine):
                    await receiving
        finally:
            if receiving:
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError, EngineError):
                    await receiving
        for rank, answer in enumerate(answers):
            if "problem" in answer:
                raise EngineError(
                    f"{engine.name}: trainer rank {rank} cannot connect to it: {answer['problem']}"
                )
        self._windows = max(self._windows, *(answer["num_windows"] for answer in answers))

    async def _send(self, engines: Sequence[Engine], lose: Lose, gone: Sequence[int] = ()) -> None:
        """gone: engines of which the trainer need keep nothing."""
        indices = [engine.index for engine in engines]
        answers = await self.trainer.call_all(
            "send_weights", push=self._number, engines=indices, gone=list(gone)
        )
        for rank, answer in enumerate(answers):
            for engine in engines:
                if problem := answer["problems"].get(str(engine.index)):
                    reason = f"{engine.name}: trainer rank {rank} lost it: {problem}"
                    lose(engine, EngineDied(reason))

    def _update(self) -> dict[str, Any]:
        return {"push": self._number, "timeout_seconds": self.settings.timeout_seconds}

    async def _prove(self, engines: Sequence[Engine], lose: Lose) -> dict[str, float]:
        """Let each engine answer the probes; raises EngineError where the trainer disagrees."""
        gaps: list[float] = []
        for engine in engines if self.probes else ():
            try:
                gap = await self._gap(engine)
            except EngineDied as death:
                lose(engine, death)
                continue
            gaps.append(gap)
            if not gap <= self.tolerance:
                raise EngineError(
                    f"after push {self._number} the log-probabilities of {engine.name} differ from "
                    f"the trainer's by {gap:.3g} in the mean (push.probe_tolerance: "
                    f"{self.tolerance:g}), although every tensor arrived as it was sent: the "
                    "engine loads or computes something else. Nothing was trained on its answers"
                )
        return {"push/probe_diff": max(gaps)} if gaps else {}

    async def _gap(self, engine: Engine) -> float:
        """Raises EngineDied where there are no answers that can be compared."""
        try:
            answers = await self._answers(engine)
        except EngineFault:  # as with every request: once may be chance
            try:
                answers = await self._answers(engine)
            except EngineFault as fault:
                raise EngineDied(f"{engine.name} did not answer the probes: {fault}") from fault
        return await self.trainer.probe(
            [
                (probe, response.token_ids, response.logprobs)
                for probe, (response,) in zip(self.probes, answers, strict=True)
            ]
        )

    async def _answers(self, engine: Engine) -> list[list[Response]]:
        """To each probe one."""
        calls = (
            engine.unless_lost(engine.client.generate(probe, n=1, max_tokens=PROBE_TOKENS, seed=0))
            for probe in self.probes
        )
        async with self._in_time(engine):
            return await asyncio.gather(*calls)
