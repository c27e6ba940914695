"""What the rewards say of an answer: accuracy by the question's own kind, and weighted terms."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from megatron_r1.config import RewardsConfig
from megatron_r1.curation.candidate import Candidate
from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.check import find_fault
from megatron_r1.rewards.combine import ACCURACY, combine, weights_at
from megatron_r1.rewards.options import FORM_REWARDS, call_fields
from megatron_r1.rewards.runtime.pool import RewardPool


class Grader:
    """Grades as a training run does in its first step (`rewards.weights`, `rewards.options`)."""

    def __init__(self, pool: RewardPool, rewards: RewardsConfig) -> None:
        self._pool, self._options = pool, rewards.options
        self._weights = weights_at(rewards.weights, step=1)

    async def grade(self, prompt: Prompt, candidate: Candidate) -> Candidate:
        """The answer with its rewards. One that a grader fails on has none, and the reason says so.
        Raises ValueError for a reward that cannot be used, RuntimeError for a service that is
        down."""
        terms = list(dict.fromkeys((ACCURACY, *self._weights)))
        grades = await asyncio.gather(*(self._call(term, prompt, candidate) for term in terms))
        reward = combine(dict(zip(terms, grades, strict=True)), self._weights)
        if failed := [t for t in reward.ungraded if t == ACCURACY or self._weights.get(t)]:
            return replace(candidate, reason=grades[terms.index(failed[0])].reason)
        return replace(candidate, rewards=reward.terms, reward=reward.total, reason=reward.reason)

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Call the reward of every kind and every term once. Raises ValueError for one that cannot
        be used."""
        for prompt in one_of_each(prompts):
            for term in dict.fromkeys((ACCURACY, *self._weights)):
                kind = prompt.kind if term == ACCURACY else term

                async def grade(response: str, prompt=prompt, term=term) -> Grade:
                    return await self._call(term, prompt, Candidate(0, response, num_tokens=0))

                if fault := await find_fault(kind, prompt.truth, grade):
                    raise ValueError(
                        f"question {prompt.id}: its {kind} answer {fault}; see "
                        f"rewards.options.{kind}"
                    )

    async def _call(self, term: str, prompt: Prompt, candidate: Candidate) -> Grade:
        kind = prompt.kind if term == ACCURACY else term
        truth = None if term != ACCURACY and kind in FORM_REWARDS else prompt.truth
        facts: dict[str, object] = {"question": prompt.question}
        if candidate.num_tokens is not None:
            facts["num_tokens"] = candidate.num_tokens
        if candidate.opened:
            facts["opened"] = True
        fields = call_fields(kind, self._options, prompt.fields, facts)
        return await self._pool.grade(kind, candidate.text, truth, **fields)
