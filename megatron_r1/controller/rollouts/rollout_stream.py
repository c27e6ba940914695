"""Rollouts that are sampled ahead of the steps that take them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class RolloutStream(Generic[T]):
    """Samples the rollouts of the steps `first_step` … `last_step`, in order."""

    def __init__(
        self,
        sample: Callable[[int], Awaitable[T]],
        first_step: int,
        last_step: int,
        staleness: int,
        *,
        one_at_a_time: bool = False,
    ):
        """Prepare the rollouts of steps, without starting one.

        Args:
            sample: samples the rollout of a step; called in the order of the steps.
            first_step: the run's next step.
            last_step: the run's last step, `run.steps`.
            staleness: how many steps ahead of training a rollout may begin.
            one_at_a_time: start a rollout only when the one before has ended: where the number of
                its prompts is not known in advance, and where engines gain nothing from more
                sequences. Otherwise rollouts overlap: the next one fills the engines while the last
                long samples of the one before are generated."""
        self._sample, self._staleness, self._last_step = sample, staleness, last_step
        self._one_at_a_time = one_at_a_time
        self._next_step = first_step
        self._tasks: dict[int, asyncio.Task[T]] = {}

    def start_allowed_by(self, policy_version: int) -> None:
        """Start the rollouts that may begin now that the engines hold `policy_version`."""
        while self._next_step <= min(self._last_step, policy_version + 1 + self._staleness):
            step, previous_task = self._next_step, self._tasks.get(self._next_step - 1)
            self._tasks[step] = asyncio.create_task(
                self._sample_after_previous(step, previous_task)
            )
            self._next_step += 1

    async def get(self, step: int) -> T:
        """Wait for the rollout of `step` and return it.

        A later rollout that has failed meanwhile raises only when it is asked for itself.

        Raises:
            ValueError: a rollout that has not begun.
            Exception: what the sampling of `step` raised.
        """
        if step not in self._tasks:
            raise ValueError(f"the rollout of step {step} has not begun: its policy is not pushed")
        try:
            return await self._tasks[step]
        finally:
            del self._tasks[step]

    async def close(self) -> None:
        """Cancel the rollouts that were sampled ahead; the engines abort their requests."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample_after_previous(self, step: int, before: asyncio.Task[T] | None) -> T:
        if self._one_at_a_time and before is not None:
            await asyncio.wait({before})
        return await self._sample(step)
