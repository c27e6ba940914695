"""The loop of `eval` and `sample`: sample what is missing, grade it, log it; resumable."""

import asyncio
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.evaluated_model import EvaluatedModel
from megatron_r1.evaluation.prompt_sets import PromptSet, prompt_digest
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.response_log import PromptKey, ResponseLog
from megatron_r1.evaluation.text_response_grader import TextResponseGrader
from megatron_r1.reporting.formatting import format_duration

MAX_UNGRADED = 20
"""Failures of a grader on one kind of prompt, before its first success, that stop the run."""
MAX_GRADING = 4
"""Responses in grading for each one in sampling; beyond that, sampling waits."""
NUM_PROGRESS_LINES = 4
REFRESH_SECONDS = 0.2

SampleJob = tuple[PromptSet, Prompt, int]
"""A response to sample: the set, the prompt, and the response's index among those to the prompt."""
Details = Callable[[PromptSet, Prompt, TextResponse], dict[str, Any]]


class ResponseSampler:
    """Samples every prompt `num_samples` times. Only responses in progress are in memory."""

    def __init__(
        self,
        model: EvaluatedModel,
        grader: TextResponseGrader | None,
        log: ResponseLog,
        sets: Sequence[PromptSet],
        seed: int,
        details: Details,
        *,
        by_prompt: bool,
    ) -> None:
        """Count what the log has and what is still to be sampled.

        Args:
            model: it answers the prompts; `run` starts and closes it.
            grader: None to log responses ungraded.
            log: the log of responses, where sampling continues.
            sets: the prompts, by benchmark.
            seed: the seed of the draws.
            details: returns more fields for a response's line.
            by_prompt: sample all responses to a prompt in a row, so that the engine can reuse its
                cache; otherwise the first responses to all prompts come first.

        Raises:
            UserError: the log has responses to other versions of the prompts."""
        self._model, self._grader, self._log = model, grader, log
        self._sets, self._seed, self._details = sets, seed, details
        self._by_prompt, self._progress = by_prompt, SamplingProgress()
        self._grading_slots = asyncio.Semaphore(MAX_GRADING * model.concurrency)
        self._num_ungraded: Counter[str] = Counter()
        self._gradable: set[str] = set()
        self._broken_grader: UserError | None = None
        self._refuse_other_versions()
        self.num_wanted = sum(len(s.prompts) * s.num_samples for s in sets)
        self.num_done = sum(log.count(map(s.key, s.prompts), s.num_samples) for s in sets)

    async def run(self) -> None:
        """Return when every response is graded and logged.

        Raises:
            Exception: the first failure of an engine, a server or a grader; the log keeps what was
                finished before.
        """
        num_missing = self.num_wanted - self.num_done
        if num_missing:
            await self._model.start()
        self._progress(self.num_done, self.num_wanted)
        jobs = self._missing_jobs()
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as grading:
                await self._grade_again(grading)
                try:
                    async with asyncio.TaskGroup() as sampling:
                        for _ in range(min(self._model.concurrency, num_missing)):
                            sampling.create_task(self._sample_jobs(jobs, grading))
                except ExceptionGroup as failures:
                    # A dead engine fails all its requests; the first failure is enough. Responses
                    # that are already sampled are still graded and logged.
                    failure = failures.exceptions[0]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            await self._log.close()
        if stopped := failure or self._broken_grader:
            raise stopped
        await self._model.close()  # voting and deciding need no engine

    def _missing_jobs(self) -> Iterator[SampleJob]:
        max_samples = max(prompt_set.num_samples for prompt_set in self._sets)
        if self._by_prompt:
            jobs = ((s, p, i) for s in self._sets for p in s.prompts for i in range(s.num_samples))
        else:
            sets = ((s, i) for i in range(max_samples) for s in self._sets if i < s.num_samples)
            jobs = ((s, p, i) for s, i in sets for p in s.prompts)
        for prompt_set, prompt, index in jobs:
            if (prompt_set.key(prompt), index) not in self._log:
                yield prompt_set, prompt, index

    async def _sample_jobs(self, jobs: Iterator[SampleJob], grading: asyncio.TaskGroup) -> None:
        for prompt_set, prompt, index in jobs:
            if self._broken_grader:
                return
            seed = sample_seed(self._seed, prompt_set.key(prompt), index)
            if prompt_set.agents is None:
                response = await self._model.respond(prompt.question, seed, prompt.messages_before)
            else:
                response = await self._model.play(prompt_set.agents, prompt, seed)
            # The next prompt is sampled while this response is graded.
            await self._grading_slots.acquire()
            response = replace(response, index=index)
            grading.create_task(
                self._grade_and_log(prompt_set, prompt, response, seed, is_new=True)
            )

    async def _grade_again(self, grading: asyncio.TaskGroup) -> None:
        """Grade the logged responses whose grader failed the last time."""
        if self._grader is None or not self._log.ungraded_responses:
            return
        ungraded = set(self._log.ungraded_responses)
        keys = {key for key, _ in ungraded}
        for prompt_set in self._sets:
            prompts = [prompt for prompt in prompt_set.prompts if prompt_set.key(prompt) in keys]
            lines_by_prompt = self._log.read(map(prompt_set.key, prompts), prompt_set.num_samples)
            lines = (
                (p, line)
                for p, prompt_lines in zip(prompts, lines_by_prompt, strict=True)
                for line in prompt_lines
            )
            for prompt, line in lines:
                if (prompt_set.key(prompt), line["index"]) in ungraded:
                    await self._grading_slots.acquire()
                    logged = TextResponse.from_line(line)
                    response = replace(logged, is_ungraded=False, reward=None)
                    finish = self._grade_and_log(
                        prompt_set, prompt, response, line["seed"], is_new=False
                    )
                    grading.create_task(finish)

    async def _grade_and_log(
        self, prompt_set: PromptSet, prompt: Prompt, response: TextResponse, seed: int, is_new: bool
    ) -> None:
        try:
            is_open = not response.refusal and response.reward is None
            if self._grader is not None and is_open:
                response = await self._grader.grade(prompt, response)
                self._count_failures(prompt_set, prompt, response)
        finally:
            self._grading_slots.release()
        line: dict[str, Any] = {"benchmark": prompt_set.title} if prompt_set.title else {}
        line |= {"id": prompt.id, "digest": prompt_digest(prompt), "seed": seed}
        self._log.add(line | response.to_line() | self._details(prompt_set, prompt, response))
        if is_new:
            self.num_done += 1
            self._progress(self.num_done, self.num_wanted)

    def _count_failures(
        self, prompt_set: PromptSet, prompt: Prompt, response: TextResponse
    ) -> None:
        """Stop sampling if a grader fails on everything: its zeros are not the model's."""
        name = (
            f"benchmark {prompt_set.title}" if prompt_set.title else f"questions of {prompt.kind}"
        )
        if not response.is_ungraded:
            self._gradable.add(name)
        elif name not in self._gradable:
            self._num_ungraded[name] += 1
            if self._num_ungraded[name] == MAX_UNGRADED:
                self._broken_grader = UserError(
                    f"{name}: no response could be graded: {response.reason}; repair what the "
                    "reward needs, or leave these questions out",
                    key="rewards",
                    cause=Cause.FAILED,
                )

    def _refuse_other_versions(self) -> None:
        for prompt_set in self._sets:
            for prompt in prompt_set.prompts:
                logged = self._log.digests.get(prompt_set.key(prompt))
                if logged is not None and logged != prompt_digest(prompt):
                    label = "give the benchmark another label, " if prompt_set.title else ""
                    benchmark = f"benchmark {prompt_set.title}, " if prompt_set.title else ""
                    raise UserError(
                        f"{self._log.path} has responses to another version of {benchmark}question "
                        f"{prompt.id} ({prompt.question[:60]!r}): its text, kind, truth or fields "
                        f"have changed. Restore them, {label}or choose another run.folder",
                        key="run.folder",
                        cause=Cause.CHANGED,
                    )


def sample_seed(seed: int, prompt: PromptKey, index: int) -> int:
    """Return 31 bits that depend on the sample alone, not on what was sampled before it.

    Args:
        seed: `run.seed`.
        prompt: what names the prompt.
        index: the number of the sample of this prompt."""
    text = "/".join(part for part in (str(seed), *prompt, str(index)) if part)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class SamplingProgress:
    """Shows progress, as one line that changes on a terminal or a few lines in a log. Called
    with (finished, wanted) after each sample."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._began: tuple[float, int] | None = None  # time, and samples finished before
        self._next_line_at = 0.0  # on a terminal
        self._num_parts_shown = -1  # in a log, of `NUM_PROGRESS_LINES`

    def __call__(self, num_done: int, total: int) -> None:
        """Print a line if it is time for one: samples done, and the time that is left."""
        now = time.monotonic()
        began, first = self._began = self._began or (now, num_done)
        num_parts = NUM_PROGRESS_LINES * num_done // max(1, total)
        is_new_part = num_parts > self._num_parts_shown
        is_due = now >= self._next_line_at if self._is_terminal else is_new_part
        if not is_due and num_done < total:
            return
        self._next_line_at, self._num_parts_shown = now + REFRESH_SECONDS, num_parts
        line = f"{num_done:,} of {total:,} samples graded"
        if first < num_done < total:
            seconds_left = (now - began) / (num_done - first) * (total - num_done)
            line += f", about {format_duration(seconds_left)} to go"
        if self._is_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if num_done == total else "", flush=True)
        else:
            print(line, flush=True)
