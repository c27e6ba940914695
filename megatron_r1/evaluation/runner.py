"""Ask every question as often as wanted, grade the answers, write them down; skip what is there."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_r1.data.prompts import Prompt, one_of_each
from megatron_r1.evaluation.ledger import Key, Ledger
from megatron_r1.evaluation.policies import Answer, Policy
from megatron_r1.evaluation.questions import QuestionSet
from megatron_r1.rewards.base import UNGRADED, Grade, shorten
from megatron_r1.rewards.check import find_fault
from megatron_r1.rewards.options import call_fields
from megatron_r1.rewards.runtime.pool import RewardPool

MAX_UNGRADED = 20
"""So many answers of a benchmark that its grader could not grade, and none that it could: then it
is the grader that is broken."""
MAX_TRUTH_CHARS = 200

Job = tuple[QuestionSet, Prompt, int]


class Runner:
    """One evaluation in progress."""

    def __init__(
        self,
        policy: Policy,
        pool: RewardPool,
        ledger: Ledger,
        sets: Sequence[QuestionSet],
        seed: int,
        options: Mapping[str, Mapping[str, Any]],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """seed: of all sampling. options: `rewards.options`. on_progress: called with (finished,
        wanted) samples.

        Raises ValueError where the ledger has answers to other questions than these.
        """
        self._policy, self._pool, self._ledger = policy, pool, ledger
        self._sets, self._seed, self._on_progress = sets, seed, on_progress
        self._options = options
        self._ungraded: Counter[str] = Counter()
        self._gradable: set[str] = set()
        self.num_wanted = sum(len(found.prompts) * found.num_samples for found in sets)
        self._num_done = 0
        _refuse_other_questions(ledger, sets)

    def missing(self) -> list[Job]:
        """What has not been sampled yet: first answers to all questions, then second ones, …"""
        return [job for job in self._jobs() if _key(job) not in self._ledger.samples]

    async def check_rewards(self) -> None:
        """Call the reward of every kind of question once. Raises ValueError for one that cannot be
        used."""
        for found in self._sets:
            for prompt in one_of_each(found.prompts):
                grade = partial(self._try_reward, prompt)
                if fault := await find_fault(prompt.kind, prompt.truth, grade):
                    raise ValueError(f"benchmark {found.title}: an answer {fault}")

    async def run(self) -> None:
        """Until every sample is graded and written. Raises what made an engine, a server or a
        grader fail; what was finished before is kept."""
        jobs = self.missing()
        self._num_done = self.num_wanted - len(jobs)
        self._on_progress(self._num_done, self.num_wanted)
        pending = iter(jobs)
        try:
            await self._grade_again()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._policy.concurrency, len(jobs))):
                    tasks.create_task(self._work(pending))
        except ExceptionGroup as failures:
            # When an engine dies, all its requests say so; the first is enough.
            raise failures.exceptions[0] from None
        finally:
            await self._ledger.close()

    def _jobs(self) -> Iterator[Job]:
        for index in range(max(found.num_samples for found in self._sets)):
            for found in self._sets:
                if index < found.num_samples:
                    yield from ((found, prompt, index) for prompt in found.prompts)

    async def _work(self, jobs: Iterator[Job]) -> None:
        for job in jobs:
            found, prompt, index = job
            seed = sample_seed(self._seed, _key(job))
            answer = await self._policy.answer(prompt.question, seed)
            await self._grade(job, seed, answer)
            self._num_done += 1
            self._on_progress(self._num_done, self.num_wanted)

    async def _grade(self, job: Job, seed: int, answer: Answer) -> None:
        found, prompt, index = job
        reward, reason = 0.0, answer.refusal
        if not reason:
            grade = await self._call_reward(prompt, answer)
            reward, reason = grade.reward, grade.reason
        self._ledger.add(
            {
                "benchmark": found.title,
                "id": prompt.id,
                "index": index,
                "seed": seed,
                "digest": found.digests[prompt.id],
                "reward": reward,
                "reason": reason,
                "length": answer.num_tokens,
                "truncated": answer.truncated,
                "opened": answer.opened,
                "refused": bool(answer.refusal),
                "truth": shorten(prompt.truth, MAX_TRUTH_CHARS),
                "response": answer.text,
            }
        )
        if not answer.refusal:
            self._watch(found, reason)

    async def _try_reward(self, prompt: Prompt, response: str) -> Grade:
        return await self._call_reward(prompt, Answer(response, 0, False, False))

    async def _call_reward(self, prompt: Prompt, answer: Answer) -> Grade:
        facts: dict[str, Any] = {"question": prompt.question}
        if answer.num_tokens is not None:
            facts["num_tokens"] = answer.num_tokens
        if answer.opened:
            facts["opened"] = True
        fields = call_fields(prompt.kind, self._options, prompt.fields, facts)
        return await self._pool.grade(prompt.kind, answer.text, prompt.truth, **fields)

    def _watch(self, found: QuestionSet, reason: str) -> None:
        """Stop where a grader fails on everything: its zeros would be read as the model's."""
        if not reason.startswith(UNGRADED):
            self._gradable.add(found.title)
        elif found.title not in self._gradable:
            self._ungraded[found.title] += 1
            if self._ungraded[found.title] == MAX_UNGRADED:
                raise ValueError(f"benchmark {found.title}: no answer could be graded: {reason}")

    async def _grade_again(self) -> None:
        """Samples that no grader could grade the last time, without asking the policy again."""
        samples = self._ledger.samples
        known = {_key(job): job for job in self._jobs()}
        keys = [key for key in known if key in samples and samples[key].ungraded]
        lines = self._ledger.responses(keys)
        answers = {
            key: Answer(line["response"], line["length"], line["truncated"], line["opened"])
            for key, line in lines.items()
        }
        grading = (self._grade(known[k], lines[k]["seed"], answers[k]) for k in answers)
        await asyncio.gather(*grading)


def sample_seed(seed: int, key: Key) -> int:
    """31 bits that depend on the sample alone, not on what was sampled before it."""
    text = f"{seed}/{key[0]}/{key[1]}/{key[2]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def question_lines(sets: Sequence[QuestionSet]) -> Iterator[dict[str, Any]]:
    """One line per question, for whoever audits samples by their id."""
    for found in sets:
        for prompt in found.prompts:
            yield {
                "benchmark": found.title,
                "id": prompt.id,
                "digest": found.digests[prompt.id],
                "kind": prompt.kind,
                "question": prompt.question,
                "truth": shorten(prompt.truth, 10 * MAX_TRUTH_CHARS),
            }


def _key(job: Job) -> Key:
    found, prompt, index = job
    return found.title, prompt.id, index


def _refuse_other_questions(ledger: Ledger, sets: Sequence[QuestionSet]) -> None:
    digests = {(found.title, i): d for found in sets for i, d in found.digests.items()}
    for (title, question, _), sample in ledger.samples.items():
        now = digests.get((title, question))
        if now is not None and now != sample.digest:
            raise ValueError(
                f"{ledger.path} has answers to another version of benchmark {title}, question "
                f"{question}: its text, truth or options have changed. Restore them, give the "
                "benchmark another label, or choose another run.folder"
            )
