"""Connects the trainer and the engines, in sets, and sends over these links."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_r1.config.push import PushConfig
from megatron_r1.engine.errors import EngineDied, EngineError
from megatron_r1.fleet.engine import Engine
from megatron_r1.weight_sync.plan.entry import engine_sets
from megatron_r1.weight_sync.plan.links import max_engines

CONNECT_SECONDS = 120.0
"""Limit for the ranks of a set and of the trainer to find each other."""
ANSWER_SECONDS = 20.0
"""The time limit for an engine to report that it could not be connected, once the trainer has; more
than `LAST_WORDS_SECONDS`, in which the client waits for the engine's end."""
MOST_UNEXPLAINED = 2
"""Failures of sets without a known cause, until every engine is a set of its own: they
may not reach each other."""

Lose = Callable[[Engine, EngineError], None]
"""Handles an engine that can no longer be used; the error is EngineDied where it is known to have
died, or its link."""


class WeightSource(Protocol):
    """The methods of `TrainerClient` that a push uses."""

    async def probe(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]]
    ) -> float: ...

    async def call_all(
        self, operation: str, *, begun: Callable[[], object] | None = None, **arguments: Any
    ) -> list[dict[str, Any]]: ...


@dataclass(eq=False)
class EngineSet:
    """Engines that receive a push together: what enters one is passed on to the others.

    name: at the trainer and in its store, new for every set. links: of each trainer rank to it."""

    name: str
    engines: list[Engine]
    links: list[int] = field(default_factory=list)


class EngineLinks:
    """The links of one trainer to all engines.

    Over gloo and nccl equal engines form sets of at most `plan.entry.SET_ENGINES`; over other
    transports, and with push.delta, every engine is a set of its own.

    tensors: name and shape of every tensor in a checkpoint of the model. layout: the fields of
    `plan.EngineLayout`, of one engine. store_host: the address of trainer rank 0's host for
    engines; None: the one that the trainer's ranks use. notify: gets a line for the user.
    colocated: the engines share the trainer's GPUs, in turn."""

    def __init__(
        self,
        trainer: WeightSource,
        settings: PushConfig,
        tensors: Sequence[tuple[str, Sequence[int]]],
        layout: dict[str, Any],
        store_host: str | None = None,
        notify: Callable[[str], None] = print,
        *,
        colocated: bool = False,
    ):
        self.notify, self.colocated = notify, colocated
        self.trainer, self.settings = trainer, settings
        self.tensors = [[name, list(shape)] for name, shape in tensors]
        self.layout, self.store_host = layout, store_host
        self.num_windows = 1
        self.sets: list[EngineSet] = []
        self._store: tuple[str, int] = ("", 0)
        self._num_sets = self._num_unexplained = 0
        self._gone: list[str] = []
        """Sets that trainer ranks still hold resources for."""

    @property
    def connect_seconds(self) -> float:
        return min(CONNECT_SECONDS, self.settings.timeout_seconds)

    @property
    def num_links(self) -> int:
        """The links of the trainer rank that has most."""
        return max(map(sum, zip(*(one.links for one in self.sets), strict=True)), default=0)

    async def open(self) -> None:
        """Let the trainer's ranks prepare to send."""
        (first, *_) = await self.trainer.call_all("open_push")
        host, port = first["store"]
        self._store = self.store_host or host, port

    def unsettled(self, engines: Sequence[Engine]) -> list[Engine]:
        """Return those of the engines that are to be divided into new sets: all that are not in
        full ones, where an engine has joined or a set has lost one. Sets with engines that are not
        among these are given up."""
        self._give_up([one for one in self.sets if not set(one.engines) <= set(engines)])
        full = [one for one in self.sets if len(one.engines) >= self._most]
        settled = {engine for one in full for engine in one.engines}
        rest = [engine for engine in engines if engine not in settled]
        partial = [one for one in self.sets if one not in full]
        is_in_set = sum(len(one.engines) for one in partial) == len(rest)
        return [] if is_in_set and len(partial) <= len(self._divided(rest)) else rest

    async def form(self, engines: Sequence[Engine], lose: Lose, *, resume: bool = True) -> None:
        """Divide these engines into new sets, and connect them with the trainer.

        An engine that dies meanwhile is lost. A set that fails for another reason is divided into
        sets of one, and those that fail again are lost. resume: engines may compute afterwards."""
        self._give_up([one for one in self.sets if set(one.engines) & set(engines)])
        groups = self._divided(engines)
        of_set: dict[Engine, str] = {}  # why its set of several could not connect
        while groups:
            sets = [self._named(group) for group in groups]
            problems, deaths = await self._connect(sets, resume)
            groups = []
            for one in sets:
                if one.name not in problems:
                    self.sets.append(one)
                    continue
                self._gone.append(one.name)
                dead = [engine for engine in one.engines if engine in deaths]
                left = [engine for engine in one.engines if engine not in deaths]
                for engine in dead:
                    lose(engine, deaths[engine])
                if dead:
                    groups += [left] if left else []
                elif len(left) > 1:
                    self._count_unexplained(problems[one.name])
                    of_set |= dict.fromkeys(left, problems[one.name])
                    groups += [[engine] for engine in left]
                else:
                    # The first problem may have left the engine unable to connect again.
                    problem, first = problems[one.name], of_set.get(left[0])
                    if first not in (None, problem):
                        problem = f"{first}; then, alone: {problem}"
                    lose(left[0], EngineError(f"{left[0].name}: {problem}"))

    async def send(self, push: int, engines: Sequence[Engine], lose: Lose) -> list[Engine]:
        """Send push number `push` to the sets of these engines.

        Engines at fault are lost. Returns the others of their sets, which have not got all of it
        and are in no set any more. Raises EngineError for a push that arrived damaged."""
        sets = [one for one in self.sets if set(one.engines) & set(engines)]
        gone, self._gone = self._gone, []
        results = await self.trainer.call_all(
            "send_weights", push=push, sets=[one.name for one in sets], gone=gone
        )
        problems: dict[str, dict[str, Any]] = {}
        for result in results:
            for name, problem in result["problems"].items():
                known = problems.setdefault(name, problem)
                known["members"] = sorted({*known["members"], *problem["members"]})
        again: list[Engine] = []
        for one in sets:
            if one.name in problems:
                again += self._blame(one, lose, **problems[one.name])
        return again

    def _blame(
        self, one: EngineSet, lose: Lose, error: str, members: Sequence[int], is_damaged: bool
    ) -> list[Engine]:
        """Lose the engines at fault, and return the others, of a set that has failed."""
        if is_damaged:
            raise EngineError(f"{', '.join(e.name for e in one.engines)}: {error}")
        self._give_up([one])
        named = one.engines if len(one.engines) == 1 else [one.engines[m] for m in members]
        at_fault = [engine for engine in one.engines if engine in named or engine.died.is_set()]
        for engine in at_fault:
            lose(engine, EngineDied(f"{engine.name} was lost during a push: {error}"))
        if not at_fault:
            self._count_unexplained(error)
        return [engine for engine in one.engines if engine not in at_fault]

    def _count_unexplained(self, error: str) -> None:
        self._num_unexplained += 1
        if self._num_unexplained == MOST_UNEXPLAINED:
            self.notify(f"engines get weights from the trainer only, not from each other: {error}")

    @contextlib.contextmanager
    def reporting_deaths(self) -> Iterator[None]:
        """While the block runs, report dead engines to the ranks that may be waiting for them."""

        async def report(one: EngineSet, engine: Engine) -> None:
            await engine.died.wait()
            await self.report_gone(one, engine)

        reports = [
            asyncio.create_task(report(one, engine))
            for one in self.sets
            for engine in one.engines
            if len(one.engines) > 1 or self.num_windows > 1
        ]
        try:
            yield
        finally:
            for task in reports:
                task.cancel()

    async def report_gone(self, one: EngineSet, engine: Engine) -> None:
        """Report to all ranks of a set that this engine of it is gone."""
        with contextlib.suppress(RuntimeError):  # the trainer is gone as well
            error = f"{engine.name} is gone"
            await asyncio.to_thread(_report_failure, *self._store, one.name, error)

    @property
    def _most(self) -> int:
        """Most engines of a set."""
        is_alone = self._num_unexplained >= MOST_UNEXPLAINED
        return 1 if is_alone else max_engines(self.settings)

    def _divided(self, engines: Sequence[Engine]) -> list[list[Engine]]:
        sets = engine_sets(len(engines), self._most) if engines else []
        return [[engines[index] for index in members] for members in sets]

    def _named(self, engines: list[Engine]) -> EngineSet:
        self._num_sets += 1
        return EngineSet(f"{engines[0].name}.{self._num_sets}.{self._store[1]}", engines)

    def _give_up(self, sets: Sequence[EngineSet]) -> None:
        self._gone += [one.name for one in sets]
        self.sets = [one for one in self.sets if one not in sets]

    async def _connect(
        self, sets: Sequence[EngineSet], resume: bool
    ) -> tuple[dict[str, str], dict[Engine, EngineError]]:
        """Connect all ranks of these sets with the trainer's. Return the problems by set, and the
        engines that have died, or do not answer."""
        calls: dict[Engine, asyncio.Task[None]] = {}

        def receive() -> None:
            for one in sets:
                for member, engine in enumerate(one.engines):
                    calls[engine] = asyncio.create_task(self._receive(one, member, resume))

        gone, self._gone = self._gone, []
        try:
            # The engines' timeout begins with the trainer's turn, which may be computing for long.
            results = await self.trainer.call_all(
                "connect_sets",
                begun=receive,
                sets=[(one.name, len(one.engines)) for one in sets],
                layout=self.layout,
                transport=self.settings.transport,
                timeout_seconds=self.connect_seconds,
                push_seconds=self.settings.timeout_seconds,
                full_every=self.settings.full_every if self.settings.delta else 1,
                gone=gone,
            )
            problems: dict[str, str] = {}
            for rank, result in enumerate(results):
                for name, problem in result["problems"].items():
                    text = f"trainer rank {rank} cannot connect to it: {problem}"
                    problems.setdefault(name, text)
            for one in sets:
                one.links = [result["num_links"].get(one.name, 0) for result in results]
            self.num_windows = max(self.num_windows, *(r["num_windows"] for r in results))
            is_good = not problems
            patience = self.settings.timeout_seconds if is_good else ANSWER_SECONDS
            if calls:
                await asyncio.wait(calls.values(), timeout=patience)
            return self._outcomes(sets, calls, problems)
        finally:
            for call in calls.values():
                call.cancel()
            await asyncio.gather(*calls.values(), return_exceptions=True)

    def _outcomes(
        self,
        sets: Sequence[EngineSet],
        calls: dict[Engine, asyncio.Task[None]],
        problems: dict[str, str],
    ) -> tuple[dict[str, str], dict[Engine, EngineError]]:
        deaths: dict[Engine, EngineError] = {}
        for one in sets:
            for engine in one.engines:
                call = calls[engine]
                error = call.exception() if call.done() else None
                if isinstance(error, EngineDied):
                    deaths[engine] = error
                elif not call.done():
                    deaths[engine] = EngineDied(f"{engine.name} does not answer while it connects")
                elif error is not None and not isinstance(error, EngineError):
                    raise error
                if error is not None or not call.done():
                    problems.setdefault(one.name, str(error or deaths[engine]))
        return problems, deaths

    async def _receive(self, one: EngineSet, member: int, resume: bool) -> None:
        """Let an engine of a set connect with the trainer."""
        engine, memory = one.engines[member], self.settings.memory_gib
        init_info = {
            "store": list(self._store),
            "name": one.name,
            "member": member,
            "members": len(one.engines),
            "tensors": self.tensors,
            "memory_bytes": memory and int(memory * 2**30),
            "timeout_seconds": self.connect_seconds,
            "push_seconds": self.settings.timeout_seconds,
            # A difference needs all of the push before in the memory.
            "borrows_memory": self.colocated and not self.settings.delta,
        }
        try:
            await engine.unless_lost(engine.client.init_weight_transfer(init_info, resume=resume))
        except EngineDied:
            await self.report_gone(one, engine)
            raise


@contextlib.asynccontextmanager
async def raise_dead_after(engine: Engine, seconds: float) -> AsyncIterator[None]:
    """Raise EngineDied where the block takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineDied(f"{engine.name} has not answered for {seconds:g} seconds") from None


def _report_failure(host: str, port: int, name: str, error: str) -> None:
    # Imports torch, which takes seconds and which the controller needs for nothing else.
    from megatron_r1.weight_sync.receive.rendezvous import report_failure

    report_failure(host, port, name, error)
