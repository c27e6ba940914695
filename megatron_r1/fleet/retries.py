"""A group is asked for until somebody's answer can be used."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_r1.engine.client import EngineClient, Response
from megatron_r1.engine.errors import EngineDied, EngineError, EngineFault
from megatron_r1.fleet.dispatch import Dispatch, Work
from megatron_r1.fleet.lengths import Expected, Lengths
from megatron_r1.fleet.pace import Answer

if TYPE_CHECKING:
    from megatron_r1.fleet.fleet import RolloutFleet

T = TypeVar("T")
MAX_ATTEMPTS = 5
"""More than the faults that get an engine replaced (`pace.MANY_FAULTS`), so that a request also
meets a fresh engine; where that fails too, the weights or the request are at fault."""


class RequestRetries:
    """For one fleet. num_requeued: sequences asked for again."""

    def __init__(self, fleet: RolloutFleet, capacity: int) -> None:
        """capacity: sequences an engine decodes at once."""
        self.fleet = fleet
        self.dispatch, self.lengths = Dispatch(capacity), Lengths()
        self.num_requeued = 0

    async def group(
        self,
        prompt: Sequence[int],
        n: int,
        max_tokens: int,
        kind: str,
        order: int,
        sampling: dict[str, Any],
    ) -> list[Response]:
        """See `RolloutFleet.generate`."""
        expected = self.lengths.expect(kind, len(prompt), max_tokens)
        made = await self._until_usable(
            Work(n, len(prompt), expected, order),
            lambda client: client.generate(prompt, n=n, max_tokens=max_tokens, **sampling),
            _lengths,
        )
        self.lengths.learn(kind, len(prompt), _lengths(made))
        return made

    async def scores(self, token_ids: Sequence[int], first: int, order: int) -> array[float]:
        """See `RolloutFleet.score`."""
        return await self._until_usable(
            Work(1, len(token_ids), Expected(1.0, 1.0, num_groups=1), order),
            lambda client: client.score(token_ids, first),
            lambda scores: [len(scores)],
        )

    async def _until_usable(
        self,
        work: Work,
        call: Callable[[EngineClient], Coroutine[Any, Any, T]],
        lengths: Callable[[T], list[int]],
    ) -> T:
        """lengths: tokens of each sequence of an answer."""
        faults = []
        while len(faults) < MAX_ATTEMPTS:
            try:
                return await self._ask(work, call, lengths)
            except EngineDied:
                continue  # not the request's doing: as often as there are restarts
            except EngineFault as fault:
                faults.append(fault)
        raise EngineError(f"{MAX_ATTEMPTS} times in a row no answer could be used: {faults[-1]}")

    async def _ask(
        self,
        work: Work,
        call: Callable[[EngineClient], Coroutine[Any, Any, T]],
        lengths: Callable[[T], list[int]],
    ) -> T:
        """Ask one engine, and tell of it if it fails. Raises its EngineDied or EngineFault where
        another may do better."""
        self.fleet.refuse_if_broken()
        engine = await self.dispatch.place(work)
        began = time.monotonic()
        try:
            answer = await engine.unless_dead(call(engine.client))
        except (EngineDied, EngineFault) as failure:
            work.avoid.add(engine)
            self.num_requeued += work.num_sequences
            if isinstance(failure, EngineDied):
                self.fleet.repairs.replace(engine, failure)
            else:
                self.fleet.repairs.suspect(engine, failure)
            raise
        finally:
            self.dispatch.done(engine, work)
        now, tokens = time.monotonic(), lengths(answer)
        engine.pace.answered(Answer(now, now - began, sum(tokens), max(tokens)))
        return answer


def _lengths(completions: Sequence[Response]) -> list[int]:
    return [len(one.token_ids) for one in completions]
