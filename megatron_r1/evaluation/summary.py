"""The metrics of a benchmark with their intervals, from its logged responses."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Self

from r1_grading import RewardPool
from r1_grading.reading import Part, Reading

from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.estimates import (
    Estimate,
    estimate_mean,
    index_subsets,
    pass_at_k,
    powers_up_to,
)
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.evaluation.response import is_thought_opened, is_ungraded
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.voting import (
    Vote,
    can_vote,
    expects_number,
    group_answers,
    read_vote,
    voted_reward,
)
from megatron_r1.evaluation.win_rates import length_difference, win_rates


@dataclass(frozen=True)
class Summary:
    """The results of one benchmark.

    Attributes:
        title: the benchmark's name in results.
        num_samples: responses to each question.
        metrics: name → estimate over questions; "length" is in tokens, the others are fractions.
        counts: the numbers of questions and samples.
        pass_at_k: k → pass@k; empty if the metrics are win rates.
        cons_at_k: k → cons@k; empty if the metrics are win rates."""

    title: str
    num_samples: int
    metrics: dict[str, Estimate]
    counts: dict[str, int]
    pass_at_k: dict[int, Estimate]
    cons_at_k: dict[int, Estimate]

    def as_json(self) -> dict[str, Any]:
        """Return samples per question, metrics with intervals and counts, for a result file."""
        return {
            "samples_per_question": self.num_samples,
            "metrics": {name: value.as_json() for name, value in self.metrics.items()},
            "counts": self.counts,
        }


@dataclass(frozen=True)
class LoggedResponse:
    """The parts of a logged response that metrics are computed from; its text stays on disk."""

    reward: float
    length: int | None
    is_truncated: bool
    is_ungraded: bool
    vote: Vote | None
    length_difference: int

    @classmethod
    def from_line(
        cls, line: Mapping[str, Any], prompt: Prompt, part: Part, reading: Reading
    ) -> Self:
        """Return the response of a line of the log.

        Args:
            line: a line of samples.jsonl.
            prompt: the prompt that it responds to.
            part: the part of a response that a judge compares.
            reading: `rewards.reading`."""
        text, thought_opened = line["response"], is_thought_opened(line)
        truth_is_number = expects_number(prompt)
        return cls(
            reward=float(line["reward"]),
            length=line["length"],
            is_truncated=line["truncated"],
            is_ungraded=is_ungraded(line),
            vote=read_vote(
                text, thought_opened, reading, kind=prompt.kind, truth_is_number=truth_is_number
            ),
            length_difference=length_difference(text, thought_opened, str(prompt.truth), part),
        )


async def summarize_benchmark(
    pool: RewardPool,
    log: ResponseLog,
    prompt_set: PromptSet,
    seed: int,
    part: Part = "summary",
    reading: Reading = "strict",
) -> Summary:
    """Summarize a benchmark whose responses are all in the log.

    Args:
        pool: the workers that compare answers.
        log: the responses in the run's folder.
        prompt_set: the benchmark's prompts.
        seed: the seed of the resampling.
        part: the part of a response that a judge compares.
        reading: `rewards.reading`, the place where answers are read.
    """
    prompts = prompt_set.prompts
    lines_by_prompt = log.read(map(prompt_set.key, prompts), prompt_set.num_samples)
    groups = [
        [LoggedResponse.from_line(line, prompt, part, reading) for line in lines]
        for prompt, lines in zip(prompts, lines_by_prompt, strict=True)
    ]
    responses = [response for group in groups for response in group]

    def mean(measure: Callable[[Sequence[LoggedResponse]], float]) -> Estimate:
        return estimate_mean([measure(group) for group in groups], seed)

    pass_curve: dict[int, Estimate] = {}
    vote_curve: dict[int, Estimate] = {}
    if prompt_set.is_pairwise:
        outcomes = [[(s.reward, s.length_difference) for s in group] for group in groups]
        metrics = win_rates(outcomes, seed)
    else:
        sizes = powers_up_to(prompt_set.num_samples)
        pass_curve = {k: mean(partial(_question_pass_at_k, k=k)) for k in sizes}
        vote_curve = await _cons_at_k_curve(pool, prompts, groups, sizes, seed)
        metrics = {"pass@1": mean(lambda group: fmean(s.reward for s in group))}
        metrics |= {f"pass@{k}": value for k, value in pass_curve.items() if k > 1}
        # cons@1 is pass@1: the majority of one answer is that answer.
        metrics |= {f"cons@{k}": value for k, value in vote_curve.items() if k > 1}
    lengths = [[s.length for s in group if s.length is not None] for group in groups]
    if all(lengths):
        metrics["length"] = estimate_mean([fmean(group_lengths) for group_lengths in lengths], seed)
    metrics["truncated"] = mean(lambda group: fmean(s.is_truncated for s in group))
    counts = {
        "questions": len(groups),
        "samples": len(responses),
        "right": sum(s.reward == 1.0 for s in responses),
        "truncated": sum(s.is_truncated for s in responses),
        "ungraded": sum(s.is_ungraded for s in responses),
        "without_length": sum(s.length is None for s in responses),
    }
    if vote_curve:
        counts["without_answer"] = sum(s.vote is None for s in responses)
    return Summary(
        prompt_set.title,
        prompt_set.num_samples,
        metrics=metrics,
        counts=counts,
        pass_at_k=pass_curve,
        cons_at_k=vote_curve,
    )


def _question_pass_at_k(group: Sequence[LoggedResponse], k: int) -> float:
    """Return pass@k of one question; a response with partial credit has not passed."""
    return pass_at_k(len(group), sum(s.reward == 1.0 for s in group), k)


async def _cons_at_k_curve(
    pool: RewardPool,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[LoggedResponse]],
    sizes: Sequence[int],
    seed: int,
) -> dict[int, Estimate]:
    """Return k → cons@k; empty if some responses have no answer that can be compared."""
    if not all(can_vote(prompt.kind) for prompt in prompts):
        return {}
    rewards = [[response.reward for response in group] for group in groups]
    answer_groups = await asyncio.gather(
        *(
            group_answers(pool, prompt.kind, [response.vote for response in group], group_rewards)
            for prompt, group, group_rewards in zip(prompts, groups, rewards, strict=True)
        )
    )
    curve = {}
    for size in sizes:
        index_sets = index_subsets(len(groups[0]), size, seed)
        voted_means = [
            fmean(
                voted_reward([answers[i] for i in s], [group_rewards[i] for i in s])
                for s in index_sets
            )
            for answers, group_rewards in zip(answer_groups, rewards, strict=True)
        ]
        curve[size] = estimate_mean(voted_means, seed)
    return curve
