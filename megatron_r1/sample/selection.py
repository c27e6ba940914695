"""Rejection sampling: which of a question's responses are kept, and why the others are not.

The first of these that applies: the model gave no response; the grader failed; the response is
empty; the whole question is too easy or too hard; the response is wrong, or its reward too low; a
filter drops it; it duplicates an earlier one. `keep.per_prompt` of the others are chosen."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import cmp_to_key

from r1_grading.terms import ACCURACY, order

from megatron_r1.config.sample import KeepConfig
from megatron_r1.data.prompts import Prompt, normalize
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.decision import DUPLICATE, UNGRADED, Decision

RunFilters = Callable[[Prompt, TextResponse], Awaitable[Decision | None]]
"""Why the filters drop a response, None to keep it (`filters.PooledFilters`)."""


class Selection:
    """Chooses the responses that a `sample` recipe keeps."""

    def __init__(
        self, keep: KeepConfig, filters: RunFilters, drops_duplicates: bool, seed: int = 0
    ) -> None:
        """seed: for `keep.choose: random`."""
        self.keep, self._filters = keep, filters
        self._drops_duplicates, self._seed = drops_duplicates, seed

    async def drops(self, prompt: Prompt, responses: Sequence[TextResponse]) -> dict[int, Decision]:
        """Return index → reason of each response that is dropped."""
        of_question = self._question_drop(responses)
        reasons = await asyncio.gather(*(self.drop(prompt, r, of_question) for r in responses))
        drops: dict[int, Decision] = {}
        first: dict[str, int] = {}
        for response, reason in zip(responses, reasons, strict=True):
            if reason is None and self._drops_duplicates:
                same = first.setdefault(normalize(response.text), response.index)
                if same != response.index:
                    reason = Decision(DUPLICATE, f"the same as response {same}")
            if reason is not None:
                drops[response.index] = reason
        return drops

    async def drop(
        self, prompt: Prompt, response: TextResponse, of_question: Decision | None = None
    ) -> Decision | None:
        """Return why a response by itself is dropped, None to keep it. of_question: why all graded
        responses to this question are dropped."""
        if response.refusal:
            return Decision("no_answer", response.refusal)
        if response.is_ungraded:
            return Decision(UNGRADED, response.reason)
        if not response.text.strip():
            return Decision("empty", "there is nothing to learn")
        if of_question is not None:
            return of_question
        keep = self.keep
        if keep.min_accuracy is not None:
            if response.rewards[ACCURACY] < keep.min_accuracy:
                return Decision("wrong", response.reason)
            if keep.min_reward is not None and order(_reward(response), keep.min_reward) < 0:
                return Decision("low_reward", f"reward {response.reward:.3g}: {response.reason}")
        return await self._filters(prompt, response)

    def in_order(self, prompt: Prompt, responses: Sequence[TextResponse]) -> list[TextResponse]:
        """Return the responses in the order in which they are chosen. Ties go to the earlier
        response; a random order depends on (seed, question) alone."""
        ordered = list(responses)
        match self.keep.choose:
            case "random":
                random.Random(f"{self._seed}/{prompt.id}").shuffle(ordered)
            case "shortest":
                ordered.sort(key=lambda response: response.length)
            case "best":
                ordered.sort(key=cmp_to_key(lambda a, b: order(_reward(b), _reward(a))))
        return ordered

    def _question_drop(self, responses: Sequence[TextResponse]) -> Decision | None:
        keep = self.keep
        if keep.min_accuracy is None or (rate := pass_rate(responses, keep.min_accuracy)) is None:
            return None
        why = f"{rate:.0%} of its responses are right"
        if keep.max_pass_rate is not None and rate > keep.max_pass_rate:
            return Decision("too_easy", why)
        if keep.min_pass_rate is not None and rate < keep.min_pass_rate:
            return Decision("too_hard", why)
        return None


def pass_rate(responses: Sequence[TextResponse], min_accuracy: float) -> float | None:
    """Return the share of the graded responses that are right; None if no response is graded."""
    graded = [r for r in responses if r.rewards and not r.is_ungraded]
    if not graded:
        return None
    return sum(r.rewards[ACCURACY] >= min_accuracy for r in graded) / len(graded)


def _reward(response: TextResponse) -> float:
    assert response.reward is not None, f"response {response.index} is not graded"
    return response.reward
