"""Grades the responses of a training run: accuracy by the prompt's own reward, and other terms."""

from __future__ import annotations

import asyncio
import math

from megatron_r1.config import RewardsConfig
from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.data.text import PromptText
from megatron_r1.engine.responses import Response
from megatron_r1.errors import UserError
from megatron_r1.rewards.base import Grade
from megatron_r1.rewards.check import find_fault
from megatron_r1.rewards.combine import ACCURACY, combine, weights_at
from megatron_r1.rewards.options import FORM_REWARDS, call_fields
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rl.rollout import GradedResponse, Group, responses_of


class ResponseGrader:
    """Turns a `Response` into a `GradedResponse` by the recipe's `rewards`."""

    def __init__(self, pool: RewardPool, text: PromptText, rewards: RewardsConfig) -> None:
        self._pool, self._text, self._rewards = pool, text, rewards

    async def grade(self, prompt: Prompt, response: Response, step: int) -> GradedResponse:
        """Grade accuracy and format, which the metrics always have, and the terms that count at
        training step `step`."""
        text = self._text.decode(response.token_ids)
        num_tokens = len(response.token_ids)
        weights = weights_at(self._rewards.weights, step)
        terms = list(dict.fromkeys((ACCURACY, "format", *weights)))
        grades = await asyncio.gather(
            *(self._call(term, prompt, text, num_tokens) for term in terms)
        )
        reward = combine(dict(zip(terms, grades, strict=True)), weights)
        return GradedResponse(
            response,
            text,
            reward.terms,
            reward.total,
            reward.reason,
            reward.ungraded,
            reward.is_graded,
        )

    async def check_rewards(self, prompts: list[Prompt]) -> None:
        """Call the reward of every kind of prompt and of every weighted term once.

        Raises UserError for one that cannot be imported or cannot grade what it is called with: a
        truth it does not understand, an option, a field or a program it lacks
        (`rewards.check.find_fault`).
        """
        for prompt in one_of_each(prompts):
            if fault := await self._fault(ACCURACY, prompt):
                raise UserError(f"question {prompt.id}: its {prompt.kind} answer {fault}")
            for term in self._rewards.weights.keys() - {ACCURACY}:
                if fault := await self._fault(term, prompt):
                    raise UserError(
                        f"rewards.weights.{term}: it {fault}; see rewards.options.{term}"
                    )

    async def _fault(self, term: str, prompt: Prompt) -> str:
        async def grade(text: str) -> Grade:
            return await self._call(term, prompt, text, num_tokens=0)

        kind = prompt.kind if term == ACCURACY else term
        return await find_fault(kind, prompt.truth, grade)

    async def _call(self, term: str, prompt: Prompt, text: str, num_tokens: int) -> Grade:
        kind = prompt.kind if term == ACCURACY else term
        truth = None if term != ACCURACY and kind in FORM_REWARDS else prompt.truth
        facts: dict[str, object] = {"question": prompt.question, "num_tokens": num_tokens}
        if self._text.opens_thought:
            facts["opened"] = True
        fields = call_fields(kind, self._rewards.options, prompt.fields, facts)
        return await self._pool.grade(kind, text, truth, **fields)


def check_grades(groups: list[Group], max_ungraded: float) -> None:
    """Check the grades of everything that was sampled for one purpose.

    Raises UserError where a reward failed on every response, RuntimeError where a larger share of
    them than `max_ungraded` could not be graded.
    """
    refuse_broken_reward(groups)
    refuse_ungraded(groups, max_ungraded)


def refuse_broken_reward(groups: list[Group]) -> None:
    """Raise UserError where one reward failed on every response: one response may break a grader,
    but not all of them."""
    responses = responses_of(groups)
    if not responses:
        return
    if broken := set.intersection(*(set(graded.ungraded) for graded in responses)):
        term = min(broken)
        name = groups[0].prompt.kind if term == ACCURACY else term
        raise UserError(
            f"reward {name!r} failed on all {len(responses)} answers: {responses[0].reason}"
        )


def refuse_ungraded(groups: list[Group], max_ungraded: float) -> None:
    """Raise RuntimeError where too many responses could not be graded: the policy would be trained
    on those that are easy to grade."""
    responses = responses_of(groups)
    ungraded = [graded for graded in responses if not graded.is_graded]
    allowed = math.ceil(max_ungraded * len(responses))
    if len(ungraded) > allowed:
        raise RuntimeError(
            f"{len(ungraded)} of {len(responses)} answers could not be graded, at most {allowed} "
            f"may be (rewards.max_ungraded: {max_ungraded:g}); the first: {ungraded[0].reason}. "
            "Repair the reward or raise that setting; the same command continues"
        )
