"""Ask every question as often as wanted, grade the answers, write them down; skip what is there."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from megatron_r1.curation.answer_log import AnswerLog
from megatron_r1.curation.candidate import Candidate, from_line, to_line
from megatron_r1.curation.grading import Grader
from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.policies import Policy
from megatron_r1.evaluation.questions import digest

MAX_UNGRADED = 20
"""So many answers to one kind of question that its grader could not grade, and none that it could:
then it is the grader that is broken."""
MAX_GRADING = 4
"""Answers being graded for each that is being sampled; with more, sampling waits."""

Job = tuple[Prompt, int]


class Collector:
    """Sampling and grading in progress. What is in memory is what is under way."""

    def __init__(
        self,
        policy: Policy,
        grader: Grader | None,
        log: AnswerLog,
        prompts: Sequence[Prompt],
        num_samples: int,
        seed: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """grader: None where answers are not graded. on_progress: called with (finished, wanted)
        answers. Raises ValueError where the log has answers to other versions of the questions."""
        self._policy, self._grader, self._log = policy, grader, log
        self._prompts, self._num_samples, self._seed = prompts, num_samples, seed
        self._on_progress = on_progress
        self._grading = asyncio.Semaphore(MAX_GRADING * policy.concurrency)
        self._ungraded: Counter[str] = Counter()
        self._gradable: set[str] = set()
        self._refuse_other_questions()
        self.num_wanted = len(prompts) * num_samples
        self.num_done = self.num_wanted - sum(1 for _ in self._missing())

    async def run(self) -> None:
        """Until every answer is graded and written. Raises what made an engine, a server or a
        grader fail; what was finished before is kept."""
        self._on_progress(self.num_done, self.num_wanted)
        jobs = self._missing()
        try:
            await self._grade_again()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._policy.concurrency, self.num_wanted - self.num_done)):
                    tasks.create_task(self._work(jobs, tasks))
        except ExceptionGroup as failures:
            # When an engine dies, all its requests say so; the first is enough.
            raise failures.exceptions[0] from None
        finally:
            await self._log.close()

    def _missing(self) -> Iterator[Job]:
        """All answers to a question one after the other: the engine knows its prompt then."""
        for prompt in self._prompts:
            for index in range(self._num_samples):
                if (prompt.id, index) not in self._log:
                    yield prompt, index

    async def _work(self, jobs: Iterator[Job], tasks: asyncio.TaskGroup) -> None:
        for prompt, index in jobs:
            seed = answer_seed(self._seed, prompt.id, index)
            said = await self._policy.answer(prompt.question, seed)
            candidate = Candidate(
                index, said.text, said.num_tokens, said.truncated, said.opened, said.refusal
            )
            # The next question is asked while this answer is graded.
            await self._grading.acquire()
            tasks.create_task(self._finish(prompt, candidate, seed))

    async def _finish(self, prompt: Prompt, candidate: Candidate, seed: int) -> None:
        try:
            await self._grade(prompt, candidate, seed)
        finally:
            self._grading.release()
        self.num_done += 1
        self._on_progress(self.num_done, self.num_wanted)

    async def _grade(self, prompt: Prompt, candidate: Candidate, seed: int) -> None:
        if self._grader is not None and not candidate.refusal:
            candidate = await self._grader.grade(prompt, candidate)
        self._log.add(
            {
                "id": prompt.id,
                "digest": digest(prompt),
                "kind": prompt.kind,
                "question": prompt.question,
                "seed": seed,
                **to_line(candidate),
            }
        )
        if self._grader is not None and not candidate.refusal:
            self._watch(prompt.kind, candidate)

    def _watch(self, kind: str, candidate: Candidate) -> None:
        """Stop where a grader fails on everything: no answer would be kept, and for no reason."""
        if not candidate.is_ungraded:
            self._gradable.add(kind)
        elif kind not in self._gradable:
            self._ungraded[kind] += 1
            if self._ungraded[kind] == MAX_UNGRADED:
                raise ValueError(f"no {kind} answer could be graded: {candidate.reason}")

    async def _grade_again(self) -> None:
        """Answers that no grader could grade the last time, without asking for them again."""
        if self._grader is None or not self._log.ungraded:
            return
        again = set(self._log.ungraded)
        questions = {question for question, _ in again}
        known = {prompt.id: prompt for prompt in self._prompts if prompt.id in questions}
        for lines in self._log.groups(known, self._num_samples):
            failed = [line for line in lines if (line["id"], line["index"]) in again]
            await asyncio.gather(
                *(self._grade(known[line["id"]], from_line(line), line["seed"]) for line in failed)
            )

    def _refuse_other_questions(self) -> None:
        for prompt in self._prompts:
            if self._log.digests.get(prompt.id, now := digest(prompt)) != now:
                raise ValueError(
                    f"{self._log.path} has answers to another version of question {prompt.id} "
                    f"({prompt.question[:60]!r}): its kind, truth or fields have changed. Restore "
                    "them, or choose another run.folder"
                )


def answer_seed(seed: int, question: str, index: int) -> int:
    """31 bits that depend on the answer alone, not on what was sampled before it."""
    text = f"{seed}/{question}/{index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
