"""A set of engines, which receive a push together, as the controller knows it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_r1.engine.errors import EngineError
from megatron_r1.fleet.engine import Engine

OnLost = Callable[[Engine, EngineError], None]
"""Handles an engine that can no longer be used; the error is EngineDied where it is known to have
died, or its link."""


@dataclass(eq=False)
class EngineSet:
    """Engines that receive a push together: what enters one is passed on to the others.

    name: at the trainer and in its store, new for every set. num_links: of each trainer rank to
    it. num_bytes: of a whole push, out of all of them."""

    name: str
    engines: list[Engine]
    num_links: list[int] = field(default_factory=list)
    num_bytes: int = 0
