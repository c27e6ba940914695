"""Rollouts ahead of training: which step's batch may be sampled when.

Step s trains the policy of version s - 1. Its batch may begin to be sampled once the engines hold
version s - 1 - ahead: with ahead 0 rollout and training take turns, with 1 the next batch is
sampled while this one is trained on (one step off), and so on; no token is older than `ahead`
versions when it is trained on. Samples in flight continue across a push, each token stamped with
the version that made it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class RolloutStream(Generic[Batch]):
    """Batches of the steps `first` … `last`, in order."""

    def __init__(
        self,
        sample: Callable[[int], Awaitable[Batch]],
        first: int,
        last: int,
        ahead: int,
        *,
        one_at_a_time: bool = False,
    ):
        """sample: makes the batch of a step; called in the order of the steps. one_at_a_time: the
        next call waits for the one before to end: for batches that draw as many prompts as it
        takes, and for engines that are no faster with fewer sequences; otherwise they overlap, and
        the next fills the engines while the last long samples of the one before are made."""
        self._sample, self._ahead, self._last = sample, ahead, last
        self._one_at_a_time = one_at_a_time
        self._next = first
        self._tasks: dict[int, asyncio.Task[Batch]] = {}

    def pushed(self, version: int) -> None:
        """The engines hold `version`: begin what may begin."""
        while self._next <= min(self._last, version + 1 + self._ahead):
            before = self._tasks.get(self._next - 1)
            self._tasks[self._next] = asyncio.create_task(self._make(self._next, before))
            self._next += 1

    async def take(self, step: int) -> Batch:
        """The batch of `step`, which must have begun; raises what making it raised.

        A later batch that fails meanwhile says so when it is taken.
        """
        if step not in self._tasks:
            raise ValueError(f"the batch of step {step} has not begun: its policy is not pushed")
        try:
            return await self._tasks[step]
        finally:
            del self._tasks[step]

    async def close(self) -> None:
        """Give up what has not been taken; the engines abort it."""
        tasks = list(self._tasks.values())
        self._tasks = {}
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _make(self, step: int, before: asyncio.Task[Batch] | None) -> Batch:
        if self._one_at_a_time and before is not None:
            await asyncio.wait({before})
        return await self._sample(step)
