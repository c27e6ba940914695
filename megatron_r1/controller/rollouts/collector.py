"""Prompts → graded groups: engines sample while reward workers grade what is finished."""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from r1_grading import RewardPool

from megatron_r1.config import RewardsConfig
from megatron_r1.controller.rollouts.group_records import SamplingRecord
from megatron_r1.controller.rollouts.in_flight import InFlightGroup, InFlightGroups
from megatron_r1.controller.rollouts.response_grader import ResponseGrader, check_grades
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout, RolloutSampling
from megatron_r1.controller.rollouts.sample_log import StepLog
from megatron_r1.controller.rollouts.teacher_fleets import TeacherFleets
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.episodes import Episode, EpisodeResult, Generate, Player
from megatron_r1.engines.fleet.dispatch import Affinity
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.responses import Response
from megatron_r1.engines.server.stop_strings import truncate_at_stop


@dataclass
class RolloutProgress:
    """The sampling settings of the groups of one rollout, and when each phase last made progress:
    when the rollout began, until it does.

    Attributes:
        sampling: how all groups are sampled.
        step_log: the step's groups on disk, if they are kept.
        sampled_at: time.perf_counter() when the newest group was sampled.
        graded_at: that time for the newest graded group.
        teacher_logprobs_at: that time for the newest group whose log-probabilities the teacher has
            computed.
    """

    sampling: RolloutSampling
    step_log: StepLog | None
    sampled_at: float
    graded_at: float
    teacher_logprobs_at: float


class RolloutCollector:
    """Samples groups with the engines, grades them with the reward workers, and has a teacher's
    engines compute their log-probabilities, where there is one."""

    def __init__(
        self,
        fleet: EngineFleet,
        pool: RewardPool,
        tokenizer: PromptTokenizer,
        rewards: RewardsConfig,
        teachers: TeacherFleets | None = None,
        player: Player | None = None,
    ):
        """Prepare to collect; nothing is sampled yet.

        Args:
            fleet: the engines that sample.
            pool: the workers that grade.
            tokenizer: encodes questions and decodes responses.
            rewards: section `rewards`.
            teachers: the teachers' engines, if any.
            player: plays episodes with an environment or agent; None: a response is one turn."""
        self.fleet = fleet
        self.pool = pool
        self.tokenizer = tokenizer
        self.teachers = teachers
        self.player = player
        self.grader = ResponseGrader(pool, tokenizer, rewards.call_options)
        self.in_flight = InFlightGroups()
        self._max_ungraded = rewards.max_ungraded

    async def collect(
        self, prompts: list[Prompt], sampling: RolloutSampling, step_log: StepLog | None = None
    ) -> Rollout:
        """Sample and grade a group for each prompt, all at once; with `sampling.with_teacher` the
        teacher computes a group's log-probabilities as soon as it is sampled.

        Groups come back in the order of `prompts`; those that `step_log` already has are not
        sampled again.

        Args:
            prompts: a prompt for each group.
            sampling: how each group is sampled.
            step_log: keeps finished groups, and has those of an interrupted step; None: none are
                kept.

        Raises:
            EngineError: an engine fails.
        """
        start = time.perf_counter()
        progress = RolloutProgress(sampling, step_log, start, start, start)
        prompt_indices = step_log.reserve(len(prompts)) if step_log else range(len(prompts))
        group_arguments = []
        for prompt, prompt_index in zip(prompts, prompt_indices, strict=True):
            # An episode that failed is played again; a response can be graded again.
            only_final = self.player is not None
            restored_group = (
                step_log.restore(prompt_index, prompt, only_final) if step_log else None
            )
            if restored_group:
                prompt_ids = restored_group.prompt_ids
            else:
                prompt_ids = self.tokenizer.encode(prompt.question, prompt.messages_before)
            group_arguments.append((prompt_index, prompt, prompt_ids, restored_group))
            await asyncio.sleep(0)  # hundreds at once would block the event loop
        # Together: the fleet orders what arrives in one turn of the event loop.
        async with _open_tasks() as tasks:
            group_tasks = [
                tasks.create_task(self._collect_group(progress, *arguments))
                for arguments in group_arguments
            ]
        return Rollout(
            [task.result() for task in group_tasks],
            progress.sampled_at - start,
            max(0.0, progress.graded_at - progress.sampled_at),
            teacher_seconds=max(0.0, progress.teacher_logprobs_at - progress.sampled_at),
        )

    async def check(self, terms: Collection[str], prompts: list[Prompt]) -> None:
        """Call every reward once, and begin an episode.

        Raises:
            UserError: a reward cannot grade, or the environment fails.
        """
        await self.grader.check_rewards(terms, prompts)
        if self.player is not None:
            await self.player.check(prompts)

    async def close(self) -> None:
        """Close the grader, and the player of episodes if there is one."""
        self.grader.close()
        if self.player is not None:
            await self.player.close()

    def check_grades(self, groups: list[Group]) -> None:
        """Check the grades of everything that was sampled for one purpose.

        Raises:
            UserError: one reward failed on every response.
            RunError: a larger share of the responses than `rewards.max_ungraded` has no grade.
        """
        check_grades(groups, self._max_ungraded)

    async def _collect_group(
        self,
        progress: RolloutProgress,
        prompt_index: int,
        prompt: Prompt,
        prompt_ids: list[int],
        restored: Group | None,
    ) -> Group:
        """Sample a group, or take the one that the log restored; grade it, while the
        teacher computes its log-probabilities."""
        sampling, step_log = progress.sampling, progress.step_log
        if step_log and restored and step_log.is_final(restored):
            return restored
        with self.in_flight.group(prompt) as tracked_group:
            results: list[EpisodeResult] = []
            if restored:
                responses = [graded.response for graded in restored.responses]
                tracked_group.await_grades()
            elif self.player is None:
                responses = await self._generate_group(prompt, prompt_ids, sampling)
            else:
                results = await self._play_episodes(prompt, sampling)
                responses = [result.episode.response() for result in results]
            progress.sampled_at = time.perf_counter()
            if not restored:
                tracked_group.sampling_done(responses)
            async with _open_tasks() as tasks:
                grading = tasks.create_task(
                    self._grade_group(progress, tracked_group, responses, results)
                )
                computing = tasks.create_task(
                    self._teacher_logprobs(progress, prompt, prompt_ids, responses, results)
                )
            graded_responses, teacher_logprobs = grading.result(), computing.result()
        if teacher_logprobs:
            graded_responses = [
                replace(graded_response, teacher_logprobs=logprobs)
                for graded_response, logprobs in zip(
                    graded_responses, teacher_logprobs, strict=True
                )
            ]
        group = Group(prompt, prompt_ids, graded_responses)
        if step_log:
            step_log.append(prompt_index, group, self._sampling_record(sampling))
        return group

    def _sampling_record(self, sampling: RolloutSampling) -> SamplingRecord:
        return SamplingRecord(
            sampling.temperature,
            sampling.top_p,
            sampling.max_response_tokens,
            tuple(self.tokenizer.stop_token_ids),
            sampling.stop,
            sampling.top_k,
            sampling.min_p,
        )

    async def _generate_group(
        self,
        prompt: Prompt,
        token_ids: Sequence[int],
        sampling: RolloutSampling,
        affinity: Affinity | None = None,
    ) -> list[Response]:
        responses = await self.fleet.generate(
            token_ids,
            n=sampling.group_size,
            max_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            sampling_mask=sampling.sampling_mask,
            stop_token_ids=self.tokenizer.stop_token_ids,
            routing=sampling.routing,
            kind=prompt.kind,
            step=sampling.step,
            affinity=affinity,
        )
        if not sampling.stop:
            return responses
        count, decode = len(token_ids), self.tokenizer.decode
        return [
            truncate_at_stop(response, count, sampling.stop, decode)[0] for response in responses
        ]

    async def _play_episodes(
        self, prompt: Prompt, sampling: RolloutSampling
    ) -> list[EpisodeResult]:
        """Play the group's episodes.

        Raises:
            EngineError: the fleet has failed; a single call that fails is its episode's.
        """
        player = self.player
        assert player is not None, "only with an environment"
        group = Affinity()  # all episodes have the same first prompt

        def policy() -> Generate:
            affinity = Affinity(origin=group)

            async def answer(token_ids: Sequence[int], max_tokens: int) -> Response:
                turn_sampling = replace(sampling, group_size=1, max_response_tokens=max_tokens)
                return (await self._generate_group(prompt, token_ids, turn_sampling, affinity))[0]

            return answer

        count, limit = sampling.group_size, sampling.max_response_tokens
        async with _open_tasks() as tasks:
            episodes = [
                tasks.create_task(player.play(prompt, policy(), limit)) for _ in range(count)
            ]
        self.fleet.state.require_usable()
        return [episode.result() for episode in episodes]

    async def _grade_group(
        self,
        progress: RolloutProgress,
        tracked: InFlightGroup,
        responses: list[Response],
        results: list[EpisodeResult],
    ) -> list[GradedResponse]:
        weights = progress.sampling.reward_weights
        if results:
            graded_responses = await self.grader.grade_episodes(tracked.prompt, results, weights)
        else:
            graded_responses = await self.grader.grade(tracked.prompt, responses, weights)
        if progress.sampling.with_teacher:
            tracked.await_teacher()
        progress.graded_at = time.perf_counter()
        return graded_responses

    async def _teacher_logprobs(
        self,
        progress: RolloutProgress,
        prompt: Prompt,
        prompt_ids: list[int],
        responses: list[Response],
        results: list[EpisodeResult],
    ) -> list[array[float]]:
        """Return the log-probabilities of each response by the teacher of its prompt; an empty
        list in a run without teachers."""
        sampling = progress.sampling
        if not sampling.with_teacher:
            return []
        teachers = self.teachers
        assert teachers is not None, "RolloutSampling.with_teacher needs a teacher"

        async def compute(token_ids: Sequence[int], first: int) -> array[float]:
            logprobs = await teachers.compute_logprobs(prompt, token_ids, first, sampling.step)
            self.in_flight.num_with_teacher_logprobs += 1
            return logprobs

        async def branch_logprobs(episode: Episode) -> array[float]:
            sampled_logprobs: array[float] = array("f")
            for branch in episode.branches:
                first = branch.is_sampled.index(1)
                all_logprobs = await compute(branch.token_ids, first)
                sampled_logprobs.extend(compress(all_logprobs, branch.is_sampled[first:]))
            return sampled_logprobs

        async with _open_tasks() as tasks:
            if results:
                computations = [
                    tasks.create_task(branch_logprobs(result.episode)) for result in results
                ]
            else:
                computations = [
                    tasks.create_task(compute([*prompt_ids, *response.token_ids], len(prompt_ids)))
                    for response in responses
                ]
        progress.teacher_logprobs_at = time.perf_counter()
        return [computation.result() for computation in computations]


@contextlib.asynccontextmanager
async def _open_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Wait for the tasks of the block at its end; where one fails, cancel the others and raise its
    error. When an engine dies, all its requests fail with it; the first error is enough."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
