"""Prompts → graded groups: engines sample while reward workers grade what is finished."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from megatron_r1.config import RewardsConfig
from megatron_r1.data.prompts import Prompt
from megatron_r1.data.text import PromptText
from megatron_r1.rewards.base import UNGRADED
from megatron_r1.rewards.combine import combine
from megatron_r1.rewards.pool import RewardPool
from megatron_r1.rollout.client import Completion
from megatron_r1.rollout.fleet import RolloutFleet


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: num_samples per prompt, limits in tokens."""

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class Output:
    """One response: what the engine made and what the rewards say of it."""

    completion: Completion
    text: str
    rewards: dict[str, float]
    reward: float
    reason: str

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason == "length"


@dataclass(frozen=True)
class Group:
    """All outputs of one prompt."""

    prompt: Prompt
    prompt_ids: list[int]
    outputs: list[Output]


@dataclass(frozen=True)
class Collected:
    """A rollout; seconds until the last token, and from there until the last grade."""

    groups: list[Group]
    rollout_seconds: float
    reward_seconds: float


class Rollouts:
    """Joins engines, tokenizer, prompt template and reward workers."""

    def __init__(
        self, fleet: RolloutFleet, pool: RewardPool, text: PromptText, rewards: RewardsConfig
    ):
        self.fleet, self.pool, self.text, self.rewards = fleet, pool, text, rewards

    async def collect(self, prompts: list[Prompt], sampling: Sampling) -> Collected:
        """Sample and grade `sampling.num_samples` outputs for each prompt, all at once.

        Groups come back in the order of `prompts`. Raises EngineError when an engine fails.
        """
        start = time.perf_counter()
        sampled_at = start

        async def one(prompt: Prompt) -> Group:
            nonlocal sampled_at
            prompt_ids = self.text.encode(prompt.question)
            completions = await self.fleet.generate(
                prompt_ids,
                n=sampling.num_samples,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop_token_ids=[self.text.end],
            )
            sampled_at = time.perf_counter()
            outputs = await asyncio.gather(*(self._grade(prompt, c) for c in completions))
            return Group(prompt, prompt_ids, list(outputs))

        try:
            async with asyncio.TaskGroup() as tasks:
                groups = [tasks.create_task(one(prompt)) for prompt in prompts]
        except ExceptionGroup as failures:
            # When an engine dies, all its requests say so; the first is enough.
            raise failures.exceptions[0] from None
        end = time.perf_counter()
        collected = [g.result() for g in groups]
        _refuse_broken_reward(collected)
        return Collected(collected, sampled_at - start, end - sampled_at)

    async def check_rewards(self, prompts: list[Prompt]) -> None:
        """Call the reward of every kind once. Raises ValueError for one that cannot be imported."""
        for prompt in {p.kind: p for p in prompts}.values():
            await self.pool.grade(prompt.kind, "", prompt.truth, **prompt.fields)

    async def _grade(self, prompt: Prompt, completion: Completion) -> Output:
        text = self.text.decode(completion.token_ids)
        opened = {"opened": True} if self.text.opens_thought else {}
        accuracy, form = await asyncio.gather(
            self.pool.grade(prompt.kind, text, prompt.truth, **opened, **prompt.fields),
            self.pool.grade("format", text, None, **opened),
        )
        reward = combine({"accuracy": accuracy, "format": form}, self.rewards.weights)
        return Output(completion, text, reward.terms, reward.total, reward.reason)


def _refuse_broken_reward(groups: list[Group]) -> None:
    """One answer may break a grader; every answer does not."""
    reasons = [output.reason for group in groups for output in group.outputs]
    if reasons and all(reason.startswith(UNGRADED) for reason in reasons):
        kind = groups[0].prompt.kind
        raise ValueError(f"reward {kind!r} failed on all {len(reasons)} answers: {reasons[0]}")
