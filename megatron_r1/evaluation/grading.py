"""Grading of single responses: accuracy by the question's kind of reward, and weighted terms."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.errors import UserError
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards import find_fault
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.combine import ACCURACY, combine
from megatron_r1.rewards.options import FORM_REWARDS, call_fields
from megatron_r1.rewards.runtime.pool import RewardPool

Options = Mapping[str, Mapping[str, Any]]


class RewardTerms:
    """Calls terms of `rewards.weights`; accuracy is the reward of the prompt's own kind."""

    def __init__(self, pool: RewardPool, options: Options) -> None:
        """options: `rewards.options`."""
        self._pool, self._options = pool, options

    async def grade(
        self, terms: Sequence[str], prompt: Prompt, text: str, num_tokens: int | None, opened: bool
    ) -> dict[str, Grade]:
        """Return term → grade. num_tokens: None if unknown. opened: the prompt ended with
        `<think>`. Raises ValueError for a reward that cannot be used, RunError for a service
        that is down."""
        facts: dict[str, object] = {"question": prompt.question}
        if num_tokens is not None:
            facts["num_tokens"] = num_tokens
        if opened:
            facts["opened"] = True
        grades = await asyncio.gather(*(self._call(term, prompt, text, facts) for term in terms))
        return dict(zip(terms, grades, strict=True))

    async def check(
        self, terms: Collection[str], prompts: Sequence[Prompt], opened: bool = False
    ) -> None:
        """Call every term and every kind of prompt's own reward once. Raises UserError for one that
        cannot be imported or cannot grade what it is called with: a truth it does not understand,
        an option, a field or a program it lacks (`find_fault`)."""
        for prompt in one_of_each(prompts):
            for term in dict.fromkeys((ACCURACY, *terms)):

                async def grade(text: str, term: str = term, prompt: Prompt = prompt) -> Grade:
                    return (await self.grade([term], prompt, text, 0, opened))[term]

                kind = _kind(term, prompt)
                if fault := await find_fault(kind, prompt.truth, grade):
                    name = f"rewards.weights.{term}: it"
                    if term == ACCURACY:
                        name = f"question {prompt.id}: its {kind} answer"
                    raise UserError(f"{name} {fault}; see rewards.options.{kind}")

    async def _call(
        self, term: str, prompt: Prompt, text: str, facts: Mapping[str, object]
    ) -> Grade:
        kind = _kind(term, prompt)
        truth = None if term != ACCURACY and kind in FORM_REWARDS else prompt.truth
        fields = call_fields(kind, self._options, prompt.fields, facts)
        return await self._pool.grade(kind, text, truth, **fields)


class Grader:
    """Grades a `TextResponse` by constant weights."""

    def __init__(self, pool: RewardPool, weights: Mapping[str, float], options: Options) -> None:
        """weights: reward term → weight in the sum. options: `rewards.options`."""
        self._rewards, self._weights = RewardTerms(pool, options), weights
        self._terms = list(dict.fromkeys((ACCURACY, *weights)))

    async def grade(self, prompt: Prompt, response: TextResponse) -> TextResponse:
        """Return the response with its rewards; with the reason alone if a grader failed on it.
        Raises as `RewardTerms.grade`."""
        grades = await self._rewards.grade(
            self._terms, prompt, response.text, response.num_tokens, response.opened
        )
        reward = combine(grades, self._weights)
        if failed := [t for t in reward.ungraded if t == ACCURACY or self._weights.get(t)]:
            return replace(response, rewards={}, reward=None, reason=grades[failed[0]].reason)
        return replace(response, rewards=reward.terms, reward=reward.total, reason=reward.reason)

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a reward that cannot be used."""
        await self._rewards.check(self._terms, prompts)


def _kind(term: str, prompt: Prompt) -> str:
    return prompt.kind if term == ACCURACY else term
