"""Assigns groups to engines: which engine gets which group, and when.

Groups wait here, not in the engines: an engine gets a little more than it can decode at once, and
more as it finishes. So a slow engine gets fewer groups by itself, and the share of a dead one goes
to the others. A group is one request to one engine, which computes its prompt once; a group above
`max_num_seqs` is several, each assigned by itself (`EngineFleet.generate`).

Of the waiting groups, those of the earlier batch come first, and in it those expected to take
longest, so that what is left for the end of a batch is short. Each goes to the engine with the
fewest expected tokens in flight; a turn of a conversation rather to the one that has its beginning
in its cache (`Affinity`).

What a group is expected to take is estimated from the responses that came back, for each kind and
size of prompt, because a proof takes more tokens than a greeting. Two numbers of a group matter:
the mean length, which is the work it makes, and the longest, which determines when the group is
complete."""

import asyncio
import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.response_length_estimates import ExpectedLength

QUEUED_FRACTION = 0.25
"""Sequences beyond what an engine decodes at once, as a share of it: they wait in the engine, so
that it is never idle between two groups."""
DEFAULT_OCCUPIED_FRACTION = 0.5
"""Share of a group's sequences that run on average, before any length is known
(`DispatchedRequest.mean_occupied_slots`). For geometric lengths and groups of 16 it is about 0.3.
Counting a group as all of its sequences would leave an engine mostly idle."""
PROMPT_TOKEN_COST = 0.1
"""Cost of a prompt token, in tokens of response: all of a prompt's are computed together, and once
for a group, while each token of a response reads the weights anew."""


@dataclass
class Affinity:
    """The engine that had the earlier turns of a conversation, or of one with the same beginning.

    Attributes:
        engine: the engine, once there is one.
        origin: the affinity shared by all conversations with the same first prompt. Until this one
            has an engine, it prefers theirs, whose cache has that prompt."""

    engine: Engine | None = None
    origin: "Affinity | None" = None

    @property
    def preferred(self) -> Engine | None:
        """The engine whose cache has most of the conversation; None before any request."""
        return self.origin.engine if self.engine is None and self.origin else self.engine

    def record_engine(self, engine: Engine) -> None:
        """Keep the engine that took the request, also for conversations with the same beginning."""
        self.engine = engine
        if self.origin is not None and self.origin.engine is None:
            self.origin.engine = engine


@dataclass
class DispatchedRequest:
    """One group to sample, or one sequence to compute log-probabilities of.

    Attributes:
        num_sequences: the responses of the group; 1 for a given sequence.
        num_prompt_tokens: tokens of the prompt, or of the given sequence.
        expected: how long its responses will be.
        step: the training step; requests of an earlier one go first.
        avoid: engines that failed at this request.
        affinity: the engine that has the earlier turns of the same conversation.
    """

    num_sequences: int
    num_prompt_tokens: int
    expected: ExpectedLength
    step: int = 0
    avoid: set[Engine] = field(default_factory=set)
    affinity: Affinity | None = None

    @property
    def cost_tokens(self) -> float:
        """Expected cost, in tokens of response."""
        return PROMPT_TOKEN_COST * self.num_prompt_tokens + self.num_sequences * self.expected.mean

    @property
    def mean_occupied_slots(self) -> float:
        """Return the mean number of sequences this group keeps in an engine until its last response
        ends."""
        if not self.expected.num_groups:
            return self.num_sequences * DEFAULT_OCCUPIED_FRACTION
        fraction = self.expected.mean / max(self.expected.longest, 1.0)
        return max(1.0, self.num_sequences * fraction)


Priority = tuple[int, bool, float, int]
"""(step, not repeated, -expected longest, arrival): the lowest goes first."""


class Dispatcher:
    """Assigns an engine to each `acquire`, in order of priority.

    Args:
        capacity: the sequences that an engine decodes at once."""

    def __init__(self, capacity: int) -> None:
        self.limit = capacity * (1 + QUEUED_FRACTION)
        self.engines: list[Engine] = []
        self._waiting: list[tuple[Priority, DispatchedRequest, asyncio.Future[Engine]]] = []
        self._arrivals = itertools.count()
        self._is_scheduled = False

    def set_engines(self, engines: Iterable[Engine]) -> None:
        """Set the engines that receive work."""
        self.engines = list(engines)
        self._schedule_assignment()

    async def acquire(self, request: DispatchedRequest) -> Engine:
        """Wait until an engine is assigned to `request`, and return the engine; `release` it after
        use.

        Raises:
            Exception: the error that `fail` was given.
        """
        future = asyncio.get_running_loop().create_future()
        max_length, arrival = request.expected.longest, next(self._arrivals)
        priority = (request.step, not request.avoid, -max_length, arrival)
        heapq.heappush(self._waiting, (priority, request, future))
        self._schedule_assignment()
        try:
            return await future
        except asyncio.CancelledError:
            # It was assigned in the same turn in which its caller was cancelled.
            if future.done() and not future.cancelled() and not future.exception():
                self.release(future.result(), request)
            raise

    def release(self, engine: Engine, request: DispatchedRequest) -> None:
        """Record that `engine` is no longer busy with `request`."""
        engine.num_running -= request.num_sequences
        engine.num_occupied -= request.mean_occupied_slots
        engine.tokens_expected -= request.cost_tokens
        self._schedule_assignment()

    def fail(self, error: Exception) -> None:
        """Raise `error` in every waiting `acquire`."""
        for _, _, future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._waiting = []

    def _schedule_assignment(self) -> None:
        # In the next turn of the event loop all groups of a batch have arrived, and can be ordered.
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._assign_engines)

    def _assign_engines(self) -> None:
        """Assign engines to waiting requests while an engine has room. A request that avoids all
        engines with room is passed by those behind it."""
        self._is_scheduled = False
        passed_entries = []
        while self._waiting and any(self._has_room(engine) for engine in self.engines):
            entry = heapq.heappop(self._waiting)
            _, request, future = entry
            if future.done():  # its caller was cancelled
                continue
            engine = self._engine_for(request)
            if engine is None:
                passed_entries.append(entry)
                continue
            if request.affinity is not None:
                request.affinity.record_engine(engine)
            engine.num_running += request.num_sequences
            engine.num_occupied += request.mean_occupied_slots
            engine.tokens_expected += request.cost_tokens
            future.set_result(engine)
        for entry in passed_entries:
            heapq.heappush(self._waiting, entry)

    def _engine_for(self, request: DispatchedRequest) -> Engine | None:
        """Return the least loaded engine with room; None if there is none. An engine that failed
        at `request` is returned only if there are no other engines. The engine that has the prompt
        in its cache counts as less loaded by the cost of the prompt."""
        not_failed = [engine for engine in self.engines if engine not in request.avoid]
        free_engines = [engine for engine in not_failed or self.engines if self._has_room(engine)]
        preferred_engine = request.affinity.preferred if request.affinity else None
        saved_tokens = PROMPT_TOKEN_COST * request.num_prompt_tokens
        return min(
            free_engines,
            key=lambda e: (
                e.tokens_expected - saved_tokens * (e is preferred_engine),
                e is not preferred_engine,
            ),
            default=None,
        )

    def _has_room(self, engine: Engine) -> bool:
        return engine.num_occupied < self.limit
