"""Grading of single responses: accuracy by the question's kind of reward, and weighted terms."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.errors import UserError
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.check import find_fault
from megatron_r1.rewards.combine import ACCURACY, combine
from megatron_r1.rewards.options import FORM_REWARDS, call_fields
from megatron_r1.rewards.runtime.pool import RewardPool


class Grader:
    """Calls the rewards as a training run does."""

    def __init__(
        self,
        pool: RewardPool,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """weights: reward term → weight in the sum. options: `rewards.options`."""
        self._pool, self._weights, self._options = pool, weights, options
        self._terms = list(dict.fromkeys((ACCURACY, *weights)))

    async def grade(self, prompt: Prompt, response: TextResponse) -> TextResponse:
        """Return the response with its rewards; with the reason alone if a grader failed on it.

        Raises ValueError for a reward that cannot be used, RuntimeError for a service that is down.
        """
        calls = (self._call(term, prompt, response) for term in self._terms)
        grades = dict(zip(self._terms, await asyncio.gather(*calls), strict=True))
        reward = combine(grades, self._weights)
        if failed := [t for t in reward.ungraded if t == ACCURACY or self._weights.get(t)]:
            return replace(response, rewards={}, reward=None, reason=grades[failed[0]].reason)
        return replace(response, rewards=reward.terms, reward=reward.total, reason=reward.reason)

    async def check(self, prompts: Sequence[Prompt], where: str = "") -> None:
        """Call every term once for every kind of prompt.

        where: begins the error's message. Raises UserError for a reward that cannot be used.
        """
        for prompt in one_of_each(prompts):
            for term in self._terms:
                kind = _kind(term, prompt)

                async def grade(response: str, term: str = term, prompt: Prompt = prompt) -> Grade:
                    return await self._call(term, prompt, TextResponse(response, 0))

                if fault := await find_fault(kind, prompt.truth, grade):
                    raise UserError(
                        f"{where}question {prompt.id}: its {kind} answer {fault}; see "
                        f"rewards.options.{kind}"
                    )

    async def _call(self, term: str, prompt: Prompt, response: TextResponse) -> Grade:
        kind = _kind(term, prompt)
        truth = None if term != ACCURACY and kind in FORM_REWARDS else prompt.truth
        facts: dict[str, object] = {"question": prompt.question}
        if response.num_tokens is not None:
            facts["num_tokens"] = response.num_tokens
        if response.opened:
            facts["opened"] = True
        fields = call_fields(kind, self._options, prompt.fields, facts)
        return await self._pool.grade(kind, response.text, truth, **fields)


def _kind(term: str, prompt: Prompt) -> str:
    return prompt.kind if term == ACCURACY else term
