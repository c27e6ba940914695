"""The grader of sampled responses: accuracy by the prompt's own reward, and the other terms.

`check_grades` stops a run in which too few responses have a grade."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from r1_grading import Grade, RewardPool, RewardTerms
from r1_grading.rewards import FiniteGrade
from r1_grading.terms import ACCURACY, Options, Reward, combine

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.processes import timeline
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, all_responses
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.episodes import Episode, EpisodeResult
from megatron_r1.engines.server.responses import Response


class ResponseGrader:
    """Turns a `Response` into a `GradedResponse`."""

    def __init__(self, pool: RewardPool, tokenizer: PromptTokenizer, options: Options) -> None:
        """Prepare to grade.

        Args:
            pool: the reward workers.
            tokenizer: decodes responses.
            options: `rewards.options`."""
        self._terms, self._tokenizer = RewardTerms(pool, options), tokenizer
        self._decoding = ThreadPoolExecutor(1, "decoding")

    def close(self) -> None:
        """End the thread that decodes; what waits for it is cancelled. The pool stays open."""
        self._decoding.shutdown(wait=False, cancel_futures=True)

    async def grade(
        self, prompt: Prompt, responses: Sequence[Response], weights: Mapping[str, float]
    ) -> list[GradedResponse]:
        """Grade accuracy and format, which the metrics always have, and the terms of `weights`.

        Args:
            prompt: the row, whose kind names the reward.
            responses: sampled for it.
            weights: term → its weight in the reward."""
        # In a thread, and one group after the other: 16 x 64K tokens take 40 ms, and of a batch
        # many groups may arrive at once.
        loop = asyncio.get_running_loop()
        texts = await loop.run_in_executor(self._decoding, self._decode_responses, responses)
        pairs = zip(responses, texts, strict=True)
        return await asyncio.gather(
            *(self._grade_response(prompt, *pair, weights) for pair in pairs)
        )

    async def grade_episodes(
        self, prompt: Prompt, results: Sequence[EpisodeResult], weights: Mapping[str, float]
    ) -> list[GradedResponse]:
        """Grade episodes. The environment's reward is the accuracy where it gives one; the other
        terms grade the last answer. An episode without a reward is ungraded.

        Args:
            prompt: the row, whose kind names the reward.
            results: the played episodes.
            weights: term → its weight in the reward."""
        return await asyncio.gather(*(self._grade_episode(prompt, r, weights) for r in results))

    async def _grade_episode(
        self, prompt: Prompt, result: EpisodeResult, weights: Mapping[str, float]
    ) -> GradedResponse:
        episode, response = result.episode, result.episode.response()
        if not episode.has_reward:
            grade = Grade.ungraded(f"{episode.status}: {episode.reason}")
            grades = dict.fromkeys((ACCURACY, *weights), grade)
        else:
            terms = list(dict.fromkeys((ACCURACY, *weights)))
            if result.reward is not None:
                terms.remove(ACCURACY)
            grades = await self._terms.grade(
                terms,
                prompt,
                self._tokenizer.closed_thought + result.text,
                len(response.token_ids),
                self._tokenizer.opens_thought,
            )
            if result.reward is not None:
                reason = f"{episode.status}: the environment's reward"
                grades = {ACCURACY: FiniteGrade(result.reward, reason), **grades}
        return _make_graded_response(response, result.text, combine(grades, weights), episode)

    @timeline.timed("controller/text of tokens")
    def _decode_responses(self, responses: Sequence[Response]) -> list[str]:
        return [self._tokenizer.decode(response.token_ids) for response in responses]

    async def _grade_response(
        self, prompt: Prompt, response: Response, text: str, weights: Mapping[str, float]
    ) -> GradedResponse:
        terms = list(dict.fromkeys((ACCURACY, "format", *weights)))
        num_tokens, thought_opened = len(response.token_ids), self._tokenizer.opens_thought
        # With an empty thought that the template has closed: to the rewards it is the response's.
        text_with_thought = self._tokenizer.closed_thought + text
        grades = await self._terms.grade(
            terms, prompt, text_with_thought, num_tokens, thought_opened
        )
        return _make_graded_response(response, text, combine(grades, weights))

    async def check_rewards(self, terms: Collection[str], prompts: list[Prompt]) -> None:
        """Call the reward of every kind of prompt and every term once.

        Raises:
            UserError: a reward cannot be imported.
            RewardUnusable: a reward cannot grade what it is called with.
        """
        await self._terms.check(terms, prompts, self._tokenizer.opens_thought)


def _make_graded_response(
    response: Response, text: str, reward: Reward, episode: Episode | None = None
) -> GradedResponse:
    return GradedResponse(
        response,
        text,
        reward.terms,
        reward.total,
        reward.reason,
        reward.ungraded,
        reward.is_graded,
        episode=episode,
    )


def check_grades(groups: list[Group], max_ungraded: float) -> None:
    """Check the grades of everything that was sampled for one purpose.

    Raises:
        UserError: one reward failed on every response: one may break a grader, but not all.
        RunError: a larger share of them than `max_ungraded` could not be graded: the policy would
            be trained on those that are easy to grade.
    """
    responses = all_responses(groups)
    if not responses:
        return
    faults = Counter(r.episode.status for r in responses if r.episode and not r.episode.has_reward)
    broken_terms = set.intersection(*(set(graded.ungraded_terms) for graded in responses))
    if broken_terms and not faults:
        term = min(broken_terms)
        names = {group.prompt.kind for group in groups} if term == ACCURACY else {term}
        raise UserError(
            f"reward {', '.join(map(repr, sorted(names)))} failed on all {len(responses)} "
            f"responses: {responses[0].reason}; "
            "repair it, its rewards.options, or leave it out of rewards.weights",
            key="kind" if term == ACCURACY else f"rewards.weights.{term}",
            cause=Cause.FAILED,
        )
    ungraded_responses = [graded for graded in responses if not graded.is_graded]
    num_allowed = math.ceil(max_ungraded * len(responses))
    if len(ungraded_responses) > num_allowed:
        fault_counts = ", ".join(f"{count} {status}" for status, count in faults.most_common())
        raise RunError(
            f"{len(ungraded_responses)} of {len(responses)} "
            f"{'episodes' if faults else 'responses'} could not be "
            f"graded{f' ({fault_counts})' if fault_counts else ''}, at most {num_allowed} may be "
            f"(rewards.max_ungraded: {max_ungraded:g}); the first: {ungraded_responses[0].reason}. "
            f"Repair the {'environment' if faults else 'reward'} or raise that setting; the same "
            "command continues"
        )
