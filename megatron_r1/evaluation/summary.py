"""Every metric of every benchmark, with its interval, from the logged samples."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Self

from r1_grading import RewardPool
from r1_grading.reading import Part

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.measures import (
    Estimate,
    estimate,
    length_difference,
    pass_at_k,
    powers_up_to,
    subsets,
    win_rates,
)
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.evaluation.response import ResponseLog, is_ungraded
from megatron_r1.evaluation.voting import (
    Vote,
    can_vote,
    expects_number,
    group_answers,
    read_vote,
    voted_reward,
)


@dataclass(frozen=True)
class Summary:
    """The results of one benchmark.

    Attributes:
        metrics: name → estimate over questions; "length" is in tokens, the others are fractions.
        counts: the numbers of questions and samples.
        passes: k → pass@k; empty if the metrics are win rates.
        votes: k → cons@k; empty likewise."""

    title: str
    num_samples: int
    metrics: dict[str, Estimate]
    counts: dict[str, int]
    passes: dict[int, Estimate]
    votes: dict[int, Estimate]

    def as_json(self) -> dict[str, Any]:
        """Return samples per question, metrics with intervals and counts, for a result file."""
        return {
            "samples_per_question": self.num_samples,
            "metrics": {name: value.as_json() for name, value in self.metrics.items()},
            "counts": self.counts,
        }


@dataclass(frozen=True)
class GradedSample:
    """The parts of a logged sample that metrics are computed from; its text stays on disk."""

    reward: float
    length: int | None
    truncated: bool
    ungraded: bool
    vote: Vote | None
    difference: int

    @classmethod
    def from_line(cls, line: Mapping[str, Any], prompt: Prompt, part: Part, reading: str) -> Self:
        """Return the sample of a line of the log.

        Args:
            line: a line of samples.jsonl.
            prompt: the prompt that it responds to.
            part: the part of a response that a judge compares.
            reading: `rewards.answer`."""
        text, opened = line["response"], line["opened"]
        numeric = expects_number(prompt)
        return cls(
            reward=float(line["reward"]),
            length=line["length"],
            truncated=line["truncated"],
            ungraded=is_ungraded(line),
            vote=read_vote(text, opened, reading, kind=prompt.kind, numeric=numeric),
            difference=length_difference(text, opened, str(prompt.truth), part),
        )


async def summarize(
    pool: RewardPool,
    log: ResponseLog,
    prompt_set: PromptSet,
    seed: int,
    part: Part = "summary",
    reading: str = "strict",
) -> Summary:
    """Summarize a benchmark whose samples are all in the log.

    Args:
        pool: the workers that compare answers.
        log: the responses in the run's folder.
        prompt_set: the benchmark's prompts.
        seed: the seed of the resampling.
        part: the part of a response that a judge compares.
        reading: `rewards.answer`, the place where answers are read.
    """
    prompts = prompt_set.prompts
    lines_of = log.read(map(prompt_set.key, prompts), prompt_set.num_samples)
    groups = [
        [GradedSample.from_line(line, prompt, part, reading) for line in lines]
        for prompt, lines in zip(prompts, lines_of, strict=True)
    ]
    samples = [sample for group in groups for sample in group]

    def mean(measure: Callable[[Sequence[GradedSample]], float]) -> Estimate:
        return estimate([measure(group) for group in groups], seed)

    passes: dict[int, Estimate] = {}
    votes: dict[int, Estimate] = {}
    if prompt_set.compares:
        compared = [[(s.reward, s.difference) for s in group] for group in groups]
        metrics = win_rates(compared, seed)
    else:
        sizes = powers_up_to(prompt_set.num_samples)
        passes = {k: mean(partial(_pass, k=k)) for k in sizes}
        votes = await _votes(pool, prompts, groups, sizes, seed)
        metrics = {"pass@1": mean(lambda group: fmean(s.reward for s in group))}
        metrics |= {f"pass@{k}": value for k, value in passes.items() if k > 1}
        # cons@1 is pass@1: the majority of one answer is that answer.
        metrics |= {f"cons@{k}": value for k, value in votes.items() if k > 1}
    lengths = [[s.length for s in group if s.length is not None] for group in groups]
    if all(lengths):
        metrics["length"] = estimate([fmean(group_lengths) for group_lengths in lengths], seed)
    metrics["truncated"] = mean(lambda group: fmean(s.truncated for s in group))
    counts = {
        "questions": len(groups),
        "samples": len(samples),
        "right": sum(s.reward == 1.0 for s in samples),
        "truncated": sum(s.truncated for s in samples),
        "ungraded": sum(s.ungraded for s in samples),
        "without_length": sum(s.length is None for s in samples),
    }
    if votes:
        counts["without_answer"] = sum(s.vote is None for s in samples)
    return Summary(
        prompt_set.title,
        prompt_set.num_samples,
        metrics=metrics,
        counts=counts,
        passes=passes,
        votes=votes,
    )


def _pass(group: Sequence[GradedSample], k: int) -> float:
    """Return pass@k of one question; a sample with partial credit has not passed."""
    return pass_at_k(len(group), sum(s.reward == 1.0 for s in group), k)


async def _votes(
    pool: RewardPool,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[GradedSample]],
    sizes: Sequence[int],
    seed: int,
) -> dict[int, Estimate]:
    """Return k → cons@k; empty if some responses have no answer that can be compared."""
    if not all(can_vote(prompt.kind) for prompt in prompts):
        return {}
    rewards = [[sample.reward for sample in group] for group in groups]
    answer_groups = await asyncio.gather(
        *(
            group_answers(pool, prompt.kind, [sample.vote for sample in group], scores)
            for prompt, group, scores in zip(prompts, groups, rewards, strict=True)
        )
    )
    curve = {}
    for size in sizes:
        chosen = subsets(len(groups[0]), size, seed)
        scores = [
            fmean(voted_reward([of[i] for i in s], [scored[i] for i in s]) for s in chosen)
            for of, scored in zip(answer_groups, rewards, strict=True)
        ]
        curve[size] = estimate(scores, seed)
    return curve
