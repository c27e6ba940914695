"""The grader of `eval` and `sample`: rewards of a single response, summed by constant weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from r1_grading import RewardPool, RewardTerms
from r1_grading.terms import ACCURACY, Options, combine

from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.response import TextResponse


class TextResponseGrader:
    """Grades a `TextResponse` by constant weights.

    Args:
        pool: the workers that grade.
        weights: reward term → weight in the sum.
        options: the options of each kind of reward.
    """

    def __init__(self, pool: RewardPool, weights: Mapping[str, float], options: Options) -> None:
        self._rewards, self._weights = RewardTerms(pool, options), weights
        self._terms = list(dict.fromkeys((ACCURACY, *weights)))

    async def grade(self, prompt: Prompt, response: TextResponse) -> TextResponse:
        """Return the response with its rewards; with the reason alone if a grader failed on it.

        Raises:
            ValueError: a reward that cannot be used.
            RunError: the service of a reward is down.
        """
        grades = await self._rewards.grade(
            self._terms, prompt, response.text, response.num_tokens, response.thought_opened
        )
        reward = combine(grades, self._weights)
        if failed := [t for t in reward.ungraded if t == ACCURACY or self._weights.get(t)]:
            reason = grades[failed[0]].reason
            return replace(response, rewards={}, reward=None, reason=reason, is_ungraded=True)
        return replace(response, rewards=reward.terms, reward=reward.total, reason=reward.reason)

    async def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for a reward that cannot be used."""
        await self._rewards.check(self._terms, prompts)
