"""The trainer's samples of a rollout: one a response, or one a branch of an episode."""

from __future__ import annotations

import math
from itertools import accumulate

from megatron_r1.base.processes import timeline
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.trainer.training_sample import Sample


def training_samples(
    groups: list[Group], advantages_by_group: list[list[float]]
) -> list[list[Sample]]:
    """Return the trainer's samples of every response, in the groups' order.

    A response is one sample with its advantage; an episode of several turns has one for
    each of its branches. A response of no token, which has nothing to learn, is not trained on
    (NaN)."""
    with timeline.span("controller/samples"):
        return [
            _split_into_samples(group.prompt_ids, graded, value)
            for group, group_values in zip(groups, advantages_by_group, strict=True)
            for graded, value in zip(group.responses, group_values, strict=True)
        ]


def _split_into_samples(
    prompt_ids: list[int], graded: GradedResponse, outcome_advantage: float
) -> list[Sample]:
    response, teacher_logprobs = graded.response, graded.teacher_logprobs
    branches = graded.episode.branches if graded.episode else []
    if not branches:  # a single turn, or an episode in which nothing was sampled
        token_fields = prompt_ids, response.token_ids, response.logprobs
        value = outcome_advantage if len(response.token_ids) else math.nan
        return [
            Sample.pack(
                *token_fields,
                value,
                response.routing,
                teacher_logprobs,
                sampling_mask=response.sampling_mask,
            )
        ]
    counts = [branch.is_sampled.count(1) for branch in branches]
    return [
        Sample.pack_branch(
            branch.token_ids,
            branch.is_sampled,
            branch.logprobs,
            outcome_advantage,
            weight=count / sum(counts),
            num_responses=int(number == 0),
            routing=branch.routing,
            sampling_mask=branch.sampling_mask,
            teacher_logprobs=(
                None if teacher_logprobs is None else teacher_logprobs[end - count : end]
            ),
        )
        for number, (branch, count, end) in enumerate(
            zip(branches, counts, accumulate(counts), strict=True)
        )
    ]
