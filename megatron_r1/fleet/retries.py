"""Requests are repeated, on other engines if there are any, until a reply is usable."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from megatron_r1.engine.client import EngineClient
from megatron_r1.engine.errors import EngineDied, EngineError, EngineFault
from megatron_r1.engine.responses import Response
from megatron_r1.fleet.dispatch import Work
from megatron_r1.fleet.engine import Engine
from megatron_r1.fleet.lengths import ExpectedLength, LengthEstimator
from megatron_r1.fleet.members import Members
from megatron_r1.fleet.pace import ServedGroup

T = TypeVar("T")
OnFailure = Callable[[Engine, EngineDied | EngineFault], None]
MAX_ATTEMPTS = 5
"""More than the faults that get an engine replaced (`pace.MANY_FAULTS`), so that a request also
meets a fresh engine; where that fails too, the weights or the request are at fault."""


class RequestRetries:
    """num_requeued: sequences requested again, in all."""

    def __init__(self, members: Members, on_failure: OnFailure) -> None:
        """on_failure: called with an engine that died or gave an unusable reply."""
        self.members, self.on_failure = members, on_failure
        self.lengths = LengthEstimator()
        self.num_requeued = 0

    async def generate(
        self,
        prompt: Sequence[int],
        n: int,
        max_tokens: int,
        kind: str,
        order: int,
        sampling: dict[str, Any],
    ) -> list[Response]:
        """See `RolloutFleet.generate`."""
        expected = self.lengths.estimate(kind, len(prompt), max_tokens)
        responses = await self._until_usable(
            Work(n, len(prompt), expected, order),
            lambda client: client.generate(prompt, n=n, max_tokens=max_tokens, **sampling),
            _lengths,
        )
        self.lengths.add(kind, len(prompt), _lengths(responses))
        return responses

    async def score(self, token_ids: Sequence[int], first: int, order: int) -> array[float]:
        """See `RolloutFleet.score`."""
        return await self._until_usable(
            Work(1, len(token_ids), ExpectedLength(1.0, 1.0, num_groups=1), order),
            lambda client: client.score(token_ids, first),
            lambda scores: [len(scores)],
        )

    async def _until_usable(
        self,
        work: Work,
        call: Callable[[EngineClient], Coroutine[Any, Any, T]],
        lengths: Callable[[T], list[int]],
    ) -> T:
        """lengths: returns the tokens of each sequence of a result."""
        faults: list[EngineFault] = []
        while len(faults) < MAX_ATTEMPTS:
            try:
                return await self._attempt(work, call, lengths)
            except EngineDied:
                continue  # not the request's fault; bounded by the restarts
            except EngineFault as fault:
                faults.append(fault)
        raise EngineError(f"{MAX_ATTEMPTS} times in a row no answer could be used: {faults[-1]}")

    async def _attempt(
        self,
        work: Work,
        call: Callable[[EngineClient], Coroutine[Any, Any, T]],
        lengths: Callable[[T], list[int]],
    ) -> T:
        """Call one engine. Raises its EngineDied or EngineFault where another may do better."""
        self.members.require_usable()
        dispatcher = self.members.dispatcher
        engine = await dispatcher.acquire(work)
        began = time.monotonic()
        try:
            result = await engine.unless_dead(call(engine.client))
        except (EngineDied, EngineFault) as failure:
            work.avoid.add(engine)
            self.num_requeued += work.num_sequences
            self.on_failure(engine, failure)
            raise
        finally:
            dispatcher.release(engine, work)
        now, tokens = time.monotonic(), lengths(result)
        engine.pace.add(ServedGroup(now, now - began, sum(tokens), max(tokens)))
        return result


def _lengths(responses: Sequence[Response]) -> list[int]:
    return [len(response.token_ids) for response in responses]
