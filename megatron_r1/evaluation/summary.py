"""From graded samples to numbers: every metric of every benchmark, with its interval."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_r1.evaluation.estimators import (
    Estimate,
    estimate,
    pass_at_k,
    powers_up_to,
    subsets,
)
from megatron_r1.evaluation.questions import QuestionSet
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.voting import Vote, can_vote, group_answers, majority_of, read_vote
from megatron_r1.rewards.base import UNGRADED
from megatron_r1.rewards.runtime.pool import RewardPool


@dataclass(frozen=True)
class Summary:
    """The results of one benchmark.

    metrics: name → estimate over questions; "length" in tokens, the others fractions. counts: of
    questions and samples. passes, votes: k → pass@k and cons@k.
    """

    title: str
    num_samples: int
    metrics: dict[str, Estimate]
    counts: dict[str, int]
    passes: dict[int, Estimate]
    votes: dict[int, Estimate]

    def as_json(self) -> dict[str, Any]:
        return {
            "samples_per_question": self.num_samples,
            "metrics": {name: value.as_json() for name, value in self.metrics.items()},
            "counts": self.counts,
        }


@dataclass(frozen=True)
class Graded:
    """What the metrics need of a logged sample; its text stays on disk."""

    reward: float
    length: int | None
    truncated: bool
    ungraded: bool
    vote: Vote | None

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Graded:
        is_ungraded = line["reason"].startswith(UNGRADED)
        vote = read_vote(line["response"], line["opened"])
        return cls(float(line["reward"]), line["length"], line["truncated"], is_ungraded, vote)


async def summarize(
    pool: RewardPool, log: ResponseLog, sets: Sequence[QuestionSet], seed: int
) -> list[Summary]:
    """Return a summary of each benchmark, whose samples must all be in the log.

    seed: of the resampling.
    """
    return [await _summarize(pool, log, found, seed) for found in sets]


async def _summarize(pool: RewardPool, log: ResponseLog, found: QuestionSet, seed: int) -> Summary:
    lines_of = log.read(map(found.key, found.prompts), found.num_samples)
    samples = {
        prompt.id: [Graded.from_line(line) for line in lines]
        for prompt, lines in zip(found.prompts, lines_of, strict=True)
    }
    questions = list(samples.values())
    passes = {
        k: estimate([_pass(question, k) for question in questions], seed)
        for k in powers_up_to(found.num_samples)
    }
    votes = await _votes(pool, found, samples, seed)
    metrics = {"pass@1": estimate([fmean(s.reward for s in q) for q in questions], seed)}
    metrics |= {f"pass@{k}": value for k, value in passes.items() if k > 1}
    # cons@1 is pass@1: the majority of one answer is that answer.
    metrics |= {f"cons@{k}": value for k, value in votes.items() if k > 1}
    lengths = [[s.length for s in q if s.length is not None] for q in questions]
    if all(lengths):
        metrics["length"] = estimate([fmean(of_question) for of_question in lengths], seed)
    metrics["truncated"] = estimate([fmean(s.truncated for s in q) for q in questions], seed)
    counts = _counts(questions)
    if votes:
        counts["without_answer"] = sum(s.vote is None for q in questions for s in q)
    return Summary(found.title, found.num_samples, metrics, counts, passes, votes)


def _pass(question: Sequence[Graded], k: int) -> float:
    """Return pass@k of one question; a sample with partial credit has not passed."""
    return pass_at_k(len(question), sum(s.reward == 1.0 for s in question), k)


async def _votes(
    pool: RewardPool, found: QuestionSet, samples: Mapping[str, list[Graded]], seed: int
) -> dict[int, Estimate]:
    if not all(can_vote(prompt.kind) for prompt in found.prompts):
        return {}
    grouped = await asyncio.gather(
        *(
            group_answers(
                pool,
                prompt.kind,
                [sample.vote for sample in samples[prompt.id]],
                [sample.reward for sample in samples[prompt.id]],
            )
            for prompt in found.prompts
        )
    )
    rewards = [[s.reward for s in samples[prompt.id]] for prompt in found.prompts]
    curve = {}
    for size in powers_up_to(found.num_samples):
        chosen = subsets(found.num_samples, size, seed)
        scores = [
            fmean(_vote_of(subset, groups, scored) for subset in chosen)
            for groups, scored in zip(grouped, rewards, strict=True)
        ]
        curve[size] = estimate(scores, seed)
    return curve


def _vote_of(
    chosen: Sequence[int], groups: Sequence[int | None], rewards: Sequence[float]
) -> float:
    """Return the reward of the majority's answer among the samples `chosen`; 0 without votes."""
    winner = majority_of([groups[i] for i in chosen])
    return 0.0 if winner is None else rewards[chosen[winner]]


def _counts(questions: Sequence[Sequence[Graded]]) -> dict[str, int]:
    samples = [sample for question in questions for sample in question]
    return {
        "questions": len(questions),
        "samples": len(samples),
        "right": sum(s.reward == 1.0 for s in samples),
        "truncated": sum(s.truncated for s in samples),
        "ungraded": sum(s.ungraded for s in samples),
        "without_length": sum(s.length is None for s in samples),
    }
