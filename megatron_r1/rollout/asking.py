"""A group is asked for until somebody's answer can be used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_r1.rollout.client import Completion
from megatron_r1.rollout.dispatch import Dispatch, Work
from megatron_r1.rollout.errors import EngineDied, EngineError, EngineFault
from megatron_r1.rollout.lengths import Lengths
from megatron_r1.rollout.pace import Answer

if TYPE_CHECKING:
    from megatron_r1.rollout.fleet import RolloutFleet

MAX_ATTEMPTS = 5
"""More than the faults that get an engine replaced (`pace.MANY_FAULTS`), so that a request also
meets a fresh engine; where that fails too, the weights or the request are at fault."""


class Asking:
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
    ) -> list[Completion]:
        """See `RolloutFleet.generate`."""
        expected = self.lengths.expect(kind, len(prompt), max_tokens)
        work = Work(n, len(prompt), expected, order)
        faults = []
        while len(faults) < MAX_ATTEMPTS:
            try:
                made = await self._ask(work, prompt, {"max_tokens": max_tokens, **sampling})
            except EngineDied:
                continue  # not the request's doing: as often as there are restarts
            except EngineFault as fault:
                faults.append(fault)
                continue
            self.lengths.learn(kind, len(prompt), [len(one.token_ids) for one in made])
            return made
        raise EngineError(f"{MAX_ATTEMPTS} times in a row no answer could be used: {faults[-1]}")

    async def _ask(
        self, work: Work, prompt: Sequence[int], sampling: dict[str, Any]
    ) -> list[Completion]:
        """Ask one engine, and tell of it if it fails. Raises its EngineDied or EngineFault where
        another may do better."""
        self.fleet.refuse_if_broken()
        engine = await self.dispatch.place(work)
        began = time.monotonic()
        try:
            made = await engine.unless_dead(
                engine.client.generate(prompt, n=work.num_sequences, **sampling)
            )
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
        now, lengths = time.monotonic(), [len(one.token_ids) for one in made]
        engine.pace.answered(Answer(now, now - began, sum(lengths), max(lengths)))
        return made
