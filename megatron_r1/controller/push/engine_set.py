"""A set of engines, and what is known of one that cannot connect: by the trainer's ranks, by its
engines."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineDied, EngineError
from megatron_r1.push.control_messages import ConnectedSets, StoreUnreachable


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


def record_sizes(sets: Sequence[EngineSet], results: Sequence[ConnectedSets]) -> None:
    """Record in the sets the links and bytes that the trainer's ranks report."""
    for engine_set in sets:
        name = engine_set.name
        engine_set.num_links = [result.num_links.get(name, 0) for result in results]
        engine_set.num_bytes = sum(result.num_bytes.get(name, 0) for result in results)


def problems_of_ranks(results: Sequence[ConnectedSets]) -> dict[str, str]:
    """Return by set the first problem that a trainer rank has with it."""
    problems: dict[str, str] = {}
    for rank, result in enumerate(results):
        for name, problem in result.problems.items():
            problems.setdefault(name, f"trainer rank {rank} cannot connect to it: {problem}")
    return problems


def with_problems_of_engines(
    problems: dict[str, str], sets: Sequence[EngineSet], errors: Mapping[Engine, EngineError]
) -> dict[str, str]:
    """Return by set the problems of the trainer's ranks, and of the engines where these have none
    or know less."""
    problems = dict(problems)
    set_names = {engine: engine_set.name for engine_set in sets for engine in engine_set.engines}
    for engine, name in set_names.items():
        if engine not in errors:
            continue
        error = str(errors[engine])
        # The trainer's ranks know only that they heard nothing from such an engine.
        if name not in problems or StoreUnreachable.CODE in error:
            problems[name] = error
    return problems


def connect_errors(calls: dict[Engine, asyncio.Task[None]]) -> dict[Engine, EngineError]:
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
