"""Grades sampled responses for `eval` and `sample`, by constant weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.rewards.combine import ACCURACY, combine
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rewards.terms import Options, RewardTerms


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
            reason = grades[failed[0]].reason
            return replace(response, rewards={}, reward=None, reason=reason, is_ungraded=True)
        rewards, total, reason = reward.terms, reward.total, reward.reason
        return replace(response, rewards=rewards, reward=total, reason=reason, is_ungraded=False)

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a reward that cannot be used."""
        await self._rewards.check(self._terms, one_of_each(prompts))
