"""Samples batches ahead of training, and decides when the batch of a step may begin.

Step s trains the policy of version s - 1. Its batch may begin to be sampled once the engines hold
version s - 1 - ahead. With ahead 0 rollout and training take turns; with 1 the next batch is
sampled while this one is trained on (one step off), and so on. No token is older than `ahead`
versions when it is trained on. Sampling continues across a weight push, and each token is stamped
with the version that made it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class RolloutStream(Generic[Batch]):
    """Samples the batches of the steps `first` … `last`, in order."""

    def __init__(
        self,
        sample: Callable[[int], Awaitable[Batch]],
        first: int,
        last: int,
        ahead: int,
        *,
        one_at_a_time: bool = False,
    ):
        """sample: samples the batch of a step; called in the order of the steps.

        one_at_a_time: each call waits for the one before to end, for batches that draw a number of
        prompts not known before, and for engines that are no faster with fewer sequences. Otherwise
        calls overlap: the next batch fills the engines while the last long samples of the one
        before are being generated."""
        self._sample, self._ahead, self._last = sample, ahead, last
        self._one_at_a_time = one_at_a_time
        self._next = first
        self._tasks: dict[int, asyncio.Task[Batch]] = {}

    def pushed(self, version: int) -> None:
        """Start the batches that may begin now that the engines hold `version`."""
        while self._next <= min(self._last, version + 1 + self._ahead):
            before = self._tasks.get(self._next - 1)
            self._tasks[self._next] = asyncio.create_task(self._start(self._next, before))
            self._next += 1

    async def take(self, step: int) -> Batch:
        """Wait for the batch of `step` and return it; raises what its sampling raised.

        A later batch that has failed meanwhile raises only when it is taken itself. Raises
        ValueError for a batch that has not begun."""
        if step not in self._tasks:
            raise ValueError(f"the batch of step {step} has not begun: its policy is not pushed")
        try:
            return await self._tasks[step]
        finally:
            del self._tasks[step]

    async def close(self) -> None:
        """Cancel the batches that were not taken; the engines abort their requests."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self, step: int, before: asyncio.Task[Batch] | None) -> Batch:
        if self._one_at_a_time and before is not None:
            await asyncio.wait({before})
        return await self._sample(step)
