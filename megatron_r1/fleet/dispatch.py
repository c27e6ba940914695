"""Which engine gets which group, and when.

Groups wait here, not in the engines: an engine is given a little more than it can decode at once,
and asks for more as it finishes. So a slow engine takes less by itself, and what a dead one would
have got goes to the others. A group is one request to one engine, which computes its prompt once.

Of the groups that wait, those of the earlier batch come first, and in it those expected to take
longest: what is left for the end of a batch is then short. Each goes to the engine with the fewest
expected tokens in flight.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.lengths import Expected

SLACK = 0.25
"""Sequences beyond what an engine decodes at once, as a share of it: they wait in the engine, so
that it is never idle between two answers."""
UNKNOWN_SHARE = 0.5
"""Of a group's time, as long as nothing is known of lengths; see `Work.occupied`."""
PROMPT_TOKEN_COST = 0.1
"""Of a prompt token, in tokens of response: all of a prompt's are computed together, and once for a
group, while each token of a response reads the weights anew."""


@dataclass
class Work:
    """One group. order: batches with a lower one go first. avoid: engines that failed at it."""

    num_sequences: int
    prompt_tokens: int
    expected: Expected
    order: int = 0
    avoid: set[Engine] = field(default_factory=set)

    @property
    def tokens(self) -> float:
        """What it costs."""
        return PROMPT_TOKEN_COST * self.prompt_tokens + self.num_sequences * self.expected.mean

    @property
    def occupied(self) -> float:
        """Sequences of it that an engine decodes, on average over the time until the whole group
        is back: most end long before the longest does."""
        if not self.expected.num_groups:
            return self.num_sequences * UNKNOWN_SHARE
        share = self.expected.mean / max(self.expected.longest, 1.0)
        return max(1.0, self.num_sequences * share)


Place = tuple[int, bool, float, int]


class Dispatch:
    """Hands engines to those who wait in `place`."""

    def __init__(self, capacity: int) -> None:
        """capacity: sequences an engine decodes at once."""
        self.limit = capacity * (1 + SLACK)
        self.engines: list[Engine] = []
        self._waiting: list[tuple[Place, Work, asyncio.Future[Engine]]] = []
        self._count = itertools.count()
        self._is_due = False

    @property
    def num_waiting(self) -> int:
        """Groups without an engine."""
        return sum(not future.done() for _, _, future in self._waiting)

    def serve_with(self, engines: Iterable[Engine]) -> None:
        """These take groups from now on, and no others."""
        self.engines = list(engines)
        self._serve_soon()

    async def place(self, work: Work) -> Engine:
        """Wait for the engine that is to do `work`; tell it of the end with `done`.

        Raises what `fail` was given.
        """
        future = asyncio.get_running_loop().create_future()
        place = (work.order, not work.avoid, -work.expected.longest, next(self._count))
        heapq.heappush(self._waiting, (place, work, future))
        self._serve_soon()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and not future.exception():
                self.done(future.result(), work)
            raise

    def done(self, engine: Engine, work: Work) -> None:
        """`engine` no longer does `work`."""
        engine.num_running -= work.num_sequences
        engine.num_occupied -= work.occupied
        engine.tokens_expected -= work.tokens
        self._serve_soon()

    def fail(self, error: Exception) -> None:
        """Nobody who waits will get an engine."""
        for _, _, future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._waiting = []

    def _serve_soon(self) -> None:
        """After all that is about to wait has come: a batch asks for its groups one by one."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        """Give away as much as there is room for. One that avoids the engines with room lets those
        behind it pass."""
        self._is_due = False
        passed = []
        while self._waiting and any(self._has_room(engine) for engine in self.engines):
            entry = heapq.heappop(self._waiting)
            _, work, future = entry
            if future.done():  # its caller has given up
                continue
            engine = self._engine_for(work)
            if engine is None:
                passed.append(entry)
                continue
            engine.num_running += work.num_sequences
            engine.num_occupied += work.occupied
            engine.tokens_expected += work.tokens
            future.set_result(engine)
        for entry in passed:
            heapq.heappush(self._waiting, entry)

    def _engine_for(self, work: Work) -> Engine | None:
        """The least loaded with room, of those that have not failed at it if there are such."""
        others = [engine for engine in self.engines if engine not in work.avoid]
        free = [engine for engine in others or self.engines if self._has_room(engine)]
        return min(free, key=lambda engine: engine.tokens_expected, default=None)

    def _has_room(self, engine: Engine) -> bool:
        return engine.num_occupied < self.limit
