"""Connects sets of engines with the trainer: all their ranks meet in the trainer's store."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from megatron_r1.config.push import PushConfig
from megatron_r1.engine.errors import EngineDied, EngineError
from megatron_r1.fleet.engine import Engine
from megatron_r1.trainer_client.client import TrainerClient
from megatron_r1.weight_sync.results import ConnectedSets, OpenedPush, StoreUnreachable

CONNECT_SECONDS = 120.0
"""Limit for the ranks of a set and of the trainer to find each other."""
ANSWER_SECONDS = 20.0
"""Once the trainer has failed to connect, an engine has this long to report its own problem. Longer
than `LAST_WORDS_SECONDS`, the client's wait for a dying engine."""


OnLost = Callable[[Engine, EngineError], None]
"""Handles an engine that can no longer be used; the error is EngineDied where the engine, or its
link, is known to have died."""


@dataclass(eq=False)
class EngineSet:
    """Engines that receive a push together: what enters one is passed on to the others.

    name: at the trainer and in its store, new for every set. num_links: links of each trainer rank
    to the set. num_bytes: bytes of a whole push to the set, out of all trainer ranks."""

    name: str
    engines: list[Engine]
    num_links: list[int] = field(default_factory=list)
    num_bytes: int = 0


class SetConnector:
    """Connects sets of engines with one trainer.

    tensors: name and shape of every tensor in a checkpoint of the model. layout: the fields of
    `plan.EngineLayout`, of one engine. store_host: the address of trainer rank 0's host for
    engines; None: the one that the trainer's ranks use. colocated: the engines share the trainer's
    GPUs, in turn."""

    def __init__(
        self,
        trainer: TrainerClient,
        settings: PushConfig,
        tensors: Sequence[tuple[str, Sequence[int]]],
        layout: dict[str, Any],
        store_host: str | None = None,
        *,
        colocated: bool = False,
    ):
        self.trainer, self.settings, self.colocated = trainer, settings, colocated
        self.tensors = [[name, list(shape)] for name, shape in tensors]
        self.layout, self.store_host = layout, store_host
        self.store: tuple[str, int] = ("", 0)
        """Address of the trainer's store."""

    @property
    def connect_seconds(self) -> float:
        return min(CONNECT_SECONDS, self.settings.timeout_seconds)

    async def open(self) -> None:
        """Let the trainer's ranks prepare to send."""
        (first, *_) = cast(list[OpenedPush], await self.trainer.call_all("open_push"))
        host, port = first["store"]
        self.store = self.store_host or host, port

    async def connect(
        self, sets: Sequence[EngineSet], gone: Sequence[str], *, resume: bool
    ) -> tuple[dict[str, str], dict[Engine, EngineDied]]:
        """Connect all ranks of these sets with all trainer ranks. Return the problems by set, and
        the engines that have died or do not answer, with the error of each.

        gone: names of sets to disconnect. resume: engines may compute afterwards."""
        calls: dict[Engine, asyncio.Task[None]] = {}

        def call_engines() -> None:
            for engine_set in sets:
                for member, engine in enumerate(engine_set.engines):
                    call = self._connect_engine(engine_set, member, resume)
                    calls[engine] = asyncio.create_task(call)

        try:
            # The engines' timeout begins with the trainer's turn, which may be computing for long.
            replies = await self.trainer.call_all(
                "connect_sets",
                begun=call_engines,
                sets=[(engine_set.name, len(engine_set.engines)) for engine_set in sets],
                layout=self.layout,
                transport=self.settings.transport,
                timeout_seconds=self.connect_seconds,
                push_seconds=self.settings.timeout_seconds,
                gone=gone,
            )
            results = cast(list[ConnectedSets], replies)
            problems: dict[str, str] = {}
            for rank, result in enumerate(results):
                for name, problem in result["problems"].items():
                    text = f"trainer rank {rank} cannot connect to it: {problem}"
                    problems.setdefault(name, text)
            for engine_set in sets:
                name = engine_set.name
                engine_set.num_links = [result["num_links"].get(name, 0) for result in results]
                engine_set.num_bytes = sum(result["num_bytes"].get(name, 0) for result in results)
            patience = ANSWER_SECONDS if problems else self.settings.timeout_seconds
            if calls:
                await asyncio.wait(calls.values(), timeout=patience)
            errors = _errors(calls)
            for engine_set in sets:
                for engine in engine_set.engines:
                    if engine in errors:
                        error = str(errors[engine])
                        if StoreUnreachable.CODE in error:
                            # The trainer's ranks know only that they heard nothing from it.
                            problems[engine_set.name] = error
                        problems.setdefault(engine_set.name, error)
            deaths = {e: error for e, error in errors.items() if isinstance(error, EngineDied)}
            return problems, deaths
        finally:
            for call in calls.values():
                call.cancel()
            await asyncio.gather(*calls.values(), return_exceptions=True)

    async def _connect_engine(self, engine_set: EngineSet, member: int, resume: bool) -> None:
        """Let an engine of a set connect with the trainer."""
        engine = engine_set.engines[member]
        init_info = {
            "store": list(self.store),
            "name": engine_set.name,
            "member": member,
            "members": len(engine_set.engines),
            "tensors": self.tensors,
            "timeout_seconds": self.connect_seconds,
            "push_seconds": self.settings.timeout_seconds,
            "borrows_memory": self.colocated,
        }
        try:
            await engine.unless_lost(engine.client.init_weight_transfer(init_info, resume=resume))
        except EngineDied:
            await self.report_gone(engine_set, engine)
            raise

    async def report_gone(self, engine_set: EngineSet, engine: Engine) -> None:
        """Report to all ranks of a set that this engine of it is gone."""
        with contextlib.suppress(RuntimeError):  # the trainer is gone as well
            error = f"{engine.name} is gone"
            await asyncio.to_thread(_report_failure, *self.store, engine_set.name, error)


def _errors(calls: dict[Engine, asyncio.Task[None]]) -> dict[Engine, EngineError]:
    """Return the errors of these calls, EngineDied for one that has not ended. Raises an error of
    another kind than EngineError."""
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
    from megatron_r1.weight_sync.rendezvous import report_failure

    report_failure(host, port, name, error)
