"""Divides engines into sets, connects these with the trainer and sends to them.

All ranks meet in the trainer's store. Engines at fault are lost, the others regrouped."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_r1.config.push import PushConfig
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineDied, EngineError
from megatron_r1.push.control_messages import (
    AdapterSettings,
    ConnectedSets,
    EngineSetFailure,
    PushInitInfo,
    StoreUnreachable,
)
from megatron_r1.push.matching.layouts import EngineLayout
from megatron_r1.push.matching.planned_links import engine_sets
from megatron_r1.push.matching.recipe_plan import max_engines
from megatron_r1.trainer.operations import PushOperations

CONNECT_SECONDS = 120.0
"""Limit for the ranks of a set and of the trainer to find each other."""
ANSWER_SECONDS = 20.0
"""Once the trainer has failed to connect, an engine has this long to report its own problem. Longer
than `DEATH_WAIT_SECONDS`, the client's wait for a dying engine."""
MAX_UNATTRIBUTED_FAILURES = 2
"""Failures of sets that no engine is known to be at fault for, after which every engine is a set of
its own: the engines may not reach each other."""

OnEngineLost = Callable[[Engine, EngineError], None]
"""Handles an engine that can no longer be used; the error is EngineDied where the engine, or its
link, is known to have died."""


@dataclass(eq=False)
class EngineSet:
    """Engines that receive a push together: what enters one is relayed to the others.

    Attributes:
        name: the set's name at the trainer and in its store, new for every set.
        engines: its members, in the order of their numbers, from 0.
        num_links: links of each trainer rank to the set.
        num_bytes: bytes of a whole push to the set, out of all trainer ranks."""

    name: str
    engines: list[Engine]
    num_links: list[int] = field(default_factory=list)
    num_bytes: int = 0


class EngineLinks:
    """The links of one trainer to all engines.

    Over gloo and nccl equal engines form sets of at most
    `push.matching.planned_links.MAX_SET_ENGINES`; over other transports every engine is a set of
    its own.

    Attributes:
        tensors: name and shape of every tensor that a push sends.
        layout: that of one engine.
        store_host: the address of trainer rank 0's host for engines; None: the one that the
            trainer's ranks use.
        colocated: the engines share the trainer's GPUs, in turn.
        adapter: what engines need to serve the tensors as an adapter, if they are one.
        notify: gets a line for the user."""

    def __init__(
        self,
        trainer: TrainerClient,
        settings: PushConfig,
        tensors: Sequence[tuple[str, Sequence[int]]],
        layout: EngineLayout,
        store_host: str | None = None,
        *,
        colocated: bool = False,
        adapter: AdapterSettings | None = None,
        notify: Callable[[str], None] = print,
    ):
        self.trainer, self.settings, self.colocated = trainer, settings, colocated
        self.adapter = adapter
        self.tensors = [(name, tuple(shape)) for name, shape in tensors]
        self.layout, self.store_host, self.notify = layout, store_host, notify
        self.store: tuple[str, int] = ("", 0)
        """Address of the trainer's store."""
        self.sets: list[EngineSet] = []
        self._num_sets = self._num_unattributed_failures = 0
        self._closed_sets: list[str] = []
        """Names of dropped sets that trainer ranks still hold resources for."""

    @property
    def connect_seconds(self) -> float:
        """The limit for connecting a set of engines, in seconds."""
        return min(CONNECT_SECONDS, self.settings.timeout_seconds)

    async def open(self) -> None:
        """Let the trainer's ranks prepare to send."""
        (opened_push, *_) = await self.trainer.call_all(PushOperations.open_push)
        host, port = opened_push.store
        self.store = self.store_host or host, port

    @property
    def num_links(self) -> int:
        """The number of links of the trainer rank that has most."""
        by_set = [engine_set.num_links for engine_set in self.sets]
        return max(map(sum, zip(*by_set, strict=True)), default=0)

    @property
    def num_bytes(self) -> int:
        """The bytes of a whole push out of all trainer ranks."""
        return sum(engine_set.num_bytes for engine_set in self.sets)

    def engines_to_regroup(self, engines: Sequence[Engine]) -> list[Engine]:
        """Return the engines to divide into new sets.

        These are all that are not in full sets, if an engine joined, a set lost one or sets became
        smaller (`MAX_UNATTRIBUTED_FAILURES`); otherwise none. Sets with engines that are not among
        `engines` are dropped."""
        self._drop_sets([s for s in self.sets if not set(s.engines) <= set(engines)])
        full_sets = [s for s in self.sets if len(s.engines) == self._max_engines]
        partial_sets = [s for s in self.sets if s not in full_sets]
        in_full_set = {engine for engine_set in full_sets for engine in engine_set.engines}
        remaining_engines = [engine for engine in engines if engine not in in_full_set]
        has_joined = sum(len(s.engines) for s in partial_sets) < len(remaining_engines)
        num_sets = len(self._engines_by_set(remaining_engines))
        return remaining_engines if has_joined or len(partial_sets) != num_sets else []

    async def form_sets(
        self, engines: Sequence[Engine], on_engine_lost: OnEngineLost, *, resume: bool
    ) -> None:
        """Divide these engines into new sets, and connect them with the trainer.

        An engine that dies meanwhile is lost. A set that fails for another reason is divided into
        sets of one, and those that fail again are lost.

        Args:
            engines: running engines; their present sets are dropped.
            on_engine_lost: called with each lost engine and the error.
            resume: engines may compute afterwards."""
        self._drop_sets([s for s in self.sets if set(s.engines) & set(engines)])
        groups = self._engines_by_set(engines)
        # Why the engine's set of several could not connect.
        engine_set_problems: dict[Engine, str] = {}
        while groups:
            sets = [self._new_set(group) for group in groups]
            problems, deaths = await self.connect(sets, resume=resume)
            groups = []
            for engine_set in sets:
                if engine_set.name not in problems:
                    self.sets.append(engine_set)
                    continue
                self._closed_sets.append(engine_set.name)
                problem = problems[engine_set.name]
                dead_engines = [engine for engine in engine_set.engines if engine in deaths]
                living_engines = [engine for engine in engine_set.engines if engine not in deaths]
                for engine in dead_engines:
                    on_engine_lost(engine, deaths[engine])
                if dead_engines:
                    groups += [living_engines] if living_engines else []
                elif len(living_engines) > 1:
                    self._count_unattributed_failure(problem)
                    engine_set_problems |= dict.fromkeys(living_engines, problem)
                    groups += [[engine] for engine in living_engines]
                else:
                    # The first problem may have left the engine unable to connect again.
                    [engine] = living_engines
                    engine_set_problem = engine_set_problems.get(engine)
                    if engine_set_problem not in (None, problem):
                        problem = f"{engine_set_problem}; then, alone: {problem}"
                    on_engine_lost(engine, EngineError(f"{engine.name}: {problem}"))

    async def send(
        self, push_number: int, engines: Sequence[Engine], on_engine_lost: OnEngineLost
    ) -> list[Engine]:
        """Send a push to the sets of these engines.

        Engines at fault are lost. Returns the other engines of the sets that failed: they have not
        got all of the push, and are in no set any more.

        Args:
            push_number: the number of the push.
            engines: the engines, with which all others of their sets get it.
            on_engine_lost: called with each engine at fault and the error.

        Raises:
            EngineError: a push arrived damaged.
        """
        sets = [s for s in self.sets if set(s.engines) & set(engines)]
        closed_sets, self._closed_sets = self._closed_sets, []
        replies = await self.trainer.call_all(
            PushOperations.send_weights,
            push_number=push_number,
            sets=[s.name for s in sets],
            closed_sets=closed_sets,
        )
        failures: dict[str, list[EngineSetFailure]] = {}
        for result in replies:
            for name, failure in result.failures.items():
                failures.setdefault(name, []).append(failure)
        incomplete_engines: list[Engine] = []
        for engine_set in sets:
            if engine_set.name in failures:
                incomplete_engines += self._drop_at_fault(
                    engine_set, on_engine_lost, failures[engine_set.name]
                )
        return incomplete_engines

    @contextlib.contextmanager
    def report_deaths(self) -> Iterator[None]:
        """While the block runs, report dead engines to the ranks that may be waiting for them."""

        async def report(engine_set: EngineSet, engine: Engine) -> None:
            await engine.death_noticed.wait()
            await self.report_gone(engine_set, engine)

        reports = [
            asyncio.create_task(report(engine_set, engine))
            for engine_set in self.sets
            for engine in engine_set.engines
        ]
        try:
            yield
        finally:
            for task in reports:
                task.cancel()

    async def connect(
        self, sets: Sequence[EngineSet], *, resume: bool
    ) -> tuple[dict[str, str], dict[Engine, EngineDied]]:
        """Connect all ranks of these sets with all trainer ranks. Return the problems by set, and
        the engines that have died or do not answer, with the error of each.

        Args:
            sets: new sets; neither engines nor trainer ranks have links for them yet.
            resume: engines may compute afterwards."""
        calls: dict[Engine, asyncio.Task[None]] = {}

        def call_engines() -> None:
            for engine_set in sets:
                for member, engine in enumerate(engine_set.engines):
                    call = self._connect_engine(engine_set, member, resume)
                    calls[engine] = asyncio.create_task(call)

        try:
            results = await self._connect_ranks(sets, call_engines)
            _record_sizes(sets, results)
            problems = _problems_of_ranks(results)
            answer_timeout_seconds = ANSWER_SECONDS if problems else self.settings.timeout_seconds
            if calls:
                await asyncio.wait(calls.values(), timeout=answer_timeout_seconds)
            errors = _connect_errors(calls)
            problems = _with_problems_of_engines(problems, sets, errors)
            deaths = {e: error for e, error in errors.items() if isinstance(error, EngineDied)}
            return problems, deaths
        finally:
            for call in calls.values():
                call.cancel()
            await asyncio.gather(*calls.values(), return_exceptions=True)

    async def _connect_ranks(
        self, sets: Sequence[EngineSet], call_engines: Callable[[], None]
    ) -> list[ConnectedSets]:
        """Let all trainer ranks connect with these sets, and return their results.

        Args:
            sets: new sets, whose engines have no links yet.
            call_engines: lets the engines connect. It is called when the trainer's turn begins,
                which may be computing for long: the engines' timeout begins with it."""
        closed_sets, self._closed_sets = self._closed_sets, []
        return await self.trainer.call_all(
            PushOperations.connect_sets,
            call_engines,
            sets=[(engine_set.name, len(engine_set.engines)) for engine_set in sets],
            layout=self.layout,
            transport=self.settings.transport,
            timeout_seconds=self.connect_seconds,
            push_timeout_seconds=self.settings.timeout_seconds,
            closed_sets=closed_sets,
        )

    async def _connect_engine(self, engine_set: EngineSet, member: int, resume: bool) -> None:
        """Let an engine of a set connect with the trainer."""
        engine = engine_set.engines[member]
        init_info = PushInitInfo(
            store=self.store,
            name=engine_set.name,
            tensors=self.tensors,
            member_index=member,
            num_members=len(engine_set.engines),
            timeout_seconds=self.connect_seconds,
            push_timeout_seconds=self.settings.timeout_seconds,
            allocates_per_push=self.colocated,
            adapter=self.adapter,
        )
        try:
            await engine.await_unrepeatable_call(
                engine.client.init_weight_transfer(init_info, resume=resume)
            )
        except EngineDied:
            await self.report_gone(engine_set, engine)
            raise

    async def report_gone(self, engine_set: EngineSet, engine: Engine) -> None:
        """Report to all ranks of a set that this engine of it is gone."""
        with contextlib.suppress(RuntimeError):  # the trainer is gone as well
            error = f"{engine.name} is gone"
            await asyncio.to_thread(_report_failure, *self.store, engine_set.name, error)

    def _drop_at_fault(
        self,
        engine_set: EngineSet,
        on_engine_lost: OnEngineLost,
        failures: Sequence[EngineSetFailure],
    ) -> list[Engine]:
        """Drop the engines at fault of a set that has failed, and return its other engines.

        Args:
            engine_set: the set that has failed; its links are dropped.
            on_engine_lost: called with each engine at fault and the error.
            failures: the failures, as trainer ranks report them."""
        engines, error = engine_set.engines, failures[0].error
        members = {member for failure in failures for member in failure.members}
        if failures[0].is_damaged:
            raise EngineError(f"{', '.join(engine.name for engine in engines)}: {error}")
        self._drop_sets([engine_set])
        suspects = engines if len(engines) == 1 else [engines[member] for member in members]
        at_fault = [
            engine for engine in engines if engine in suspects or engine.death_noticed.is_set()
        ]
        for engine in at_fault:
            on_engine_lost(engine, EngineDied(f"{engine.name} was lost during a push: {error}"))
        if not at_fault:
            self._count_unattributed_failure(error)
        return [engine for engine in engines if engine not in at_fault]

    def _count_unattributed_failure(self, error: str) -> None:
        self._num_unattributed_failures += 1
        if self._num_unattributed_failures == MAX_UNATTRIBUTED_FAILURES:
            self.notify(f"engines get weights from the trainer only, not from each other: {error}")

    @property
    def _max_engines(self) -> int:
        """Most engines of a set."""
        is_alone = self._num_unattributed_failures >= MAX_UNATTRIBUTED_FAILURES
        return 1 if is_alone else max_engines(self.settings)

    def _engines_by_set(self, engines: Sequence[Engine]) -> list[list[Engine]]:
        """Return the engines of each new set."""
        sets = engine_sets(len(engines), self._max_engines) if engines else []
        return [[engines[index] for index in indices] for indices in sets]

    def _new_set(self, engines: list[Engine]) -> EngineSet:
        self._num_sets += 1
        return EngineSet(f"{engines[0].name}.{self._num_sets}.{self.store[1]}", engines)

    def _drop_sets(self, sets: Sequence[EngineSet]) -> None:
        self._closed_sets += [engine_set.name for engine_set in sets]
        self.sets = [engine_set for engine_set in self.sets if engine_set not in sets]


def _record_sizes(sets: Sequence[EngineSet], results: Sequence[ConnectedSets]) -> None:
    """Record in the sets the links and bytes that the trainer's ranks report."""
    for engine_set in sets:
        name = engine_set.name
        engine_set.num_links = [result.num_links.get(name, 0) for result in results]
        engine_set.num_bytes = sum(result.num_bytes.get(name, 0) for result in results)


def _problems_of_ranks(results: Sequence[ConnectedSets]) -> dict[str, str]:
    """Return by set the first problem that a trainer rank has with it."""
    problems: dict[str, str] = {}
    for rank, result in enumerate(results):
        for name, problem in result.problems.items():
            problems.setdefault(name, f"trainer rank {rank} cannot connect to it: {problem}")
    return problems


def _with_problems_of_engines(
    problems: dict[str, str], sets: Sequence[EngineSet], errors: Mapping[Engine, EngineError]
) -> dict[str, str]:
    """Return by set the problems of the trainer's ranks, and of the engines where these have none
    or know less."""
    problems = dict(problems)
    engine_set_names = {
        engine: engine_set.name for engine_set in sets for engine in engine_set.engines
    }
    for engine, name in engine_set_names.items():
        if engine not in errors:
            continue
        error = str(errors[engine])
        # The trainer's ranks know only that they heard nothing from such an engine.
        if name not in problems or StoreUnreachable.CODE in error:
            problems[name] = error
    return problems


def _connect_errors(calls: dict[Engine, asyncio.Task[None]]) -> dict[Engine, EngineError]:
    """Return the errors of these calls, EngineDied for one that has not ended.

    Raises:
        Exception: the first error that is not an EngineError.
    """
    errors: dict[Engine, EngineError] = {}
    for engine, call in calls.items():
        if not call.done():
            errors[engine] = EngineDied(f"{engine.name} does not answer while it connects")
        elif isinstance(error := call.exception(), EngineError):
            errors[engine] = error
        elif error is not None:
            raise error
    return errors


def _report_failure(host: str, port: int, name: str, error: str) -> None:
    # Imports torch, which takes seconds and which the controller needs for nothing else.
    from megatron_r1.push.rendezvous import report_failure

    report_failure(host, port, name, error)
