"""Prompts → graded groups: engines sample while reward workers grade what is finished."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from dataclasses import dataclass, field, replace
from typing import Protocol

from megatron_r1.config import RewardsConfig
from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.data.text import PromptText
from megatron_r1.engine.client import Response
from megatron_r1.fleet.fleet import RolloutFleet
from megatron_r1.models.routing_shape import RoutingShape
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.check import find_fault
from megatron_r1.rewards.combine import ACCURACY, combine, weights_at
from megatron_r1.rewards.options import FORM_REWARDS, call_fields
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rl.in_flight import InFlight, OpenGroup


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: num_samples per prompt, limits in tokens. step: the training step
    whose reward weights count, from 1. routing: the model's, where the experts of every token are
    to come back with it. is_scored: the teacher scores every token."""

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int
    step: int = 1
    routing: RoutingShape | None = None
    is_scored: bool = False


@dataclass(frozen=True)
class Output:
    """One response: what the engine made and what the rewards say of it (`combine.Reward`). Where
    it is not graded, its reward is 0 and no opinion of it. teacher_logprobs: float32, of each token
    at temperature 1, if it was scored."""

    completion: Response
    text: str
    rewards: dict[str, float]
    reward: float
    reason: str
    ungraded: tuple[str, ...] = ()
    is_graded: bool = True
    teacher_logprobs: array[float] | None = None

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
    """A rollout; seconds until the last token, and from there until the last grade and until the
    teacher's last score. passed_over: sampled and graded, and not trained on
    (`rl.dynamic_sampling`)."""

    groups: list[Group]
    rollout_seconds: float
    reward_seconds: float
    passed_over: list[Group] = field(default_factory=list)
    teacher_seconds: float = 0.0


@dataclass
class Ends:
    """When the last group was through with each so far, time.perf_counter()."""

    sampled: float
    graded: float
    scored: float


class Memory(Protocol):
    """Groups of a step that were finished before its run was killed (`rl.sample_log.StepLog`)."""

    def reserve(self, count: int) -> range: ...
    def recall(self, position: int, prompt: Prompt) -> Group | None: ...
    def is_final(self, group: Group) -> bool: ...
    def keep(self, position: int, group: Group) -> None: ...


class Rollouts:
    """Joins engines, tokenizer, prompt template and reward workers; and a teacher's engines."""

    def __init__(
        self,
        fleet: RolloutFleet,
        pool: RewardPool,
        text: PromptText,
        rewards: RewardsConfig,
        teacher: RolloutFleet | None = None,
    ):
        self.fleet, self.pool, self.text, self.rewards = fleet, pool, text, rewards
        self.teacher = teacher
        self.flow = InFlight()

    async def collect(
        self, prompts: list[Prompt], sampling: Sampling, memory: Memory | None = None
    ) -> Collected:
        """Sample and grade `sampling.num_samples` outputs for each prompt, all at once; with
        `sampling.is_scored` the teacher scores a group as soon as it is sampled.

        Groups come back in the order of `prompts`; what `memory` has is not sampled again. Raises
        EngineError when an engine fails.
        """
        start = time.perf_counter()
        ends = Ends(start, start, start)

        async def one(prompt: Prompt, position: int) -> Group:
            known = memory.recall(position, prompt) if memory else None
            if known is not None and memory.is_final(known):
                return known
            with self.flow.group(prompt) as doing:
                if known is None:
                    prompt_ids, completions = await self._sample(prompt, sampling)
                else:
                    prompt_ids = known.prompt_ids
                    completions = [output.completion for output in known.outputs]
                ends.sampled = time.perf_counter()
                doing.sampled(completions)
                outputs, scores = await asyncio.gather(
                    self._grades(prompt, completions, sampling.step, doing, ends),
                    self._scores(prompt_ids, completions, sampling, ends),
                )
            scored = zip(outputs, scores, strict=True)
            outputs = [replace(output, teacher_logprobs=score) for output, score in scored]
            group = Group(prompt, prompt_ids, outputs)
            if memory:
                memory.keep(position, group)
            return group

        positions = memory.reserve(len(prompts)) if memory else range(len(prompts))
        try:
            async with asyncio.TaskGroup() as tasks:
                groups = [
                    tasks.create_task(one(prompt, position))
                    for prompt, position in zip(prompts, positions, strict=True)
                ]
        except ExceptionGroup as failures:
            # When an engine dies, all its requests say so; the first is enough.
            raise failures.exceptions[0] from None
        collected = [g.result() for g in groups]
        return Collected(
            collected,
            ends.sampled - start,
            max(0.0, ends.graded - ends.sampled),
            teacher_seconds=max(0.0, ends.scored - ends.sampled),
        )

    def check_grades(self, groups: list[Group]) -> None:
        """Look at all that was sampled for a purpose.

        Raises:
            ValueError: a reward failed on every answer.
            RuntimeError: more answers than `rewards.max_ungraded` could not be graded.
        """
        refuse_broken_reward(groups)
        refuse_ungraded(groups, self.rewards.max_ungraded)

    async def _sample(self, prompt: Prompt, sampling: Sampling) -> tuple[list[int], list[Response]]:
        """The prompt's token ids and its responses."""
        prompt_ids = self.text.encode(prompt.question)
        completions = await self.fleet.generate(
            prompt_ids,
            n=sampling.num_samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=[self.text.end],
            routing=sampling.routing,
            kind=prompt.kind,
            order=sampling.step,
        )
        return prompt_ids, completions

    async def _grades(
        self,
        prompt: Prompt,
        completions: list[Response],
        step: int,
        doing: OpenGroup,
        ends: Ends,
    ) -> list[Output]:
        """The responses with their grades."""
        grades = (self._grade(prompt, made, step) for made in completions)
        outputs = await asyncio.gather(*grades)
        doing.graded()
        ends.graded = time.perf_counter()
        return outputs

    async def _scores(
        self, prompt_ids: list[int], completions: list[Response], sampling: Sampling, ends: Ends
    ) -> list[array[float] | None]:
        """The teacher's log-probabilities of each response, where there is to be any."""
        if not sampling.is_scored:
            return [None] * len(completions)
        assert self.teacher is not None, "nobody can score"

        async def score(made: Response) -> array[float]:
            whole = [*prompt_ids, *made.token_ids]
            scores = await self.teacher.score(whole, len(prompt_ids), order=sampling.step)
            self.flow.num_scored += 1
            return scores

        scores = await asyncio.gather(*(score(made) for made in completions))
        ends.scored = time.perf_counter()
        return scores

    async def check_rewards(self, prompts: list[Prompt]) -> None:
        """Call the reward of every kind and every term once, whenever it will count.

        Raises ValueError for one that cannot be imported or cannot grade what it is given: a truth
        it does not understand, an option, a field or a program it lacks (`check.find_fault`).
        """
        for prompt in one_of_each(prompts):
            if fault := await self._fault(prompt.kind, prompt, is_term=False):
                raise ValueError(f"question {prompt.id}: its {prompt.kind} answer {fault}")
            for term in self.rewards.weights.keys() - {ACCURACY}:
                if fault := await self._fault(term, prompt, is_term=True):
                    raise ValueError(
                        f"rewards.weights.{term}: it {fault}; see rewards.options.{term}"
                    )

    async def _fault(self, kind: str, prompt: Prompt, *, is_term: bool) -> str:
        async def grade(response: str) -> Grade:
            return await self._call(kind, prompt, response, 0, is_term=is_term)

        return await find_fault(kind, prompt.truth, grade)

    async def _grade(self, prompt: Prompt, completion: Response, step: int) -> Output:
        """Accuracy and format, which the metrics always have, and the terms that count now."""
        text = self.text.decode(completion.token_ids)
        num_tokens = len(completion.token_ids)
        weights = weights_at(self.rewards.weights, step)
        terms = list(dict.fromkeys((ACCURACY, "format", *weights)))
        grades = await asyncio.gather(
            *(
                self._call(prompt.kind, prompt, text, num_tokens, is_term=False)
                if term == ACCURACY
                else self._call(term, prompt, text, num_tokens, is_term=True)
                for term in terms
            )
        )
        reward = combine(dict(zip(terms, grades, strict=True)), weights)
        return Output(
            completion,
            text,
            reward.terms,
            reward.total,
            reward.reason,
            reward.ungraded,
            reward.is_graded,
        )

    async def _call(
        self, kind: str, prompt: Prompt, text: str, num_tokens: int, *, is_term: bool
    ) -> Grade:
        facts: dict[str, object] = {"question": prompt.question, "num_tokens": num_tokens}
        if self.text.opens_thought:
            facts["opened"] = True
        truth = None if is_term and kind in FORM_REWARDS else prompt.truth
        fields = call_fields(kind, self.rewards.options, prompt.fields, facts)
        return await self.pool.grade(kind, text, truth, **fields)


def refuse_broken_reward(groups: list[Group]) -> None:
    """One answer may break a grader; every answer does not."""
    outputs = [output for group in groups for output in group.outputs]
    if not outputs:
        return
    if broken := set.intersection(*(set(output.ungraded) for output in outputs)):
        term = min(broken)
        name = groups[0].prompt.kind if term == ACCURACY else term
        raise ValueError(
            f"reward {name!r} failed on all {len(outputs)} answers: {outputs[0].reason}"
        )


def refuse_ungraded(groups: list[Group], max_share: float) -> None:
    """A policy that trains on too few of its answers trains on those that are easy to grade."""
    outputs = [output for group in groups for output in group.outputs]
    ungraded = [output for output in outputs if not output.is_graded]
    most = math.ceil(max_share * len(outputs))
    if len(ungraded) > most:
        raise RuntimeError(
            f"{len(ungraded)} of {len(outputs)} answers could not be graded, at most {most} may be "
            f"(rewards.max_ungraded: {max_share:g}); the first: {ungraded[0].reason}. Mend the "
            "reward or raise that setting; the same command continues"
        )
