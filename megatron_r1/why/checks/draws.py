"""Tests whether the responses of a group were drawn one by one, by the probabilities that their
engine gave them."""

from __future__ import annotations

import math

import numpy as np

from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.reporting.formatting import format_count
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

FALSE_ALARM = 1e-9
"""The probability of a departure in a step whose responses are independent draws."""


def compare_draws(step: RecordedStep, family: str) -> Comparison:
    """Return whether responses of a group are the same tokens beyond chance.

    Each of two tests has half of `FALSE_ALARM`: long responses that are there twice, and whole
    groups of one response, which may be short.

    Args:
        step: what the run recorded of it; episodes are left out.
        family: the family of the comparison."""
    name = "draws of a group"
    groups = {
        index: group
        for index, group in enumerate(step.groups)
        if len(group.responses) > 1 and all(r.episode is None for r in group.responses)
    }
    if not groups:
        return not_checked(family, name, "no group has several responses of one turn")
    copies = [*_improbable_copies(groups), *_whole_groups(groups)]
    logprobs = [_response_logprob(step.groups[indices[0][0]], indices[0][1]) for indices in copies]
    return fraction_comparison(
        family,
        name,
        f"the responses of {len(groups):,} groups with one another",
        sorted({index for indices in copies for index in indices}),
        len(step.responses),
        reason=f"in {format_count(len({indices[0][0] for indices in copies}), 'group')} up to "
        f"{max(map(len, copies), default=0):,} responses are the same tokens, of a probability of "
        f"e^{min(logprobs, default=0):.0f} at least: they are not drawn one by one",
        remedy="the seed of each response in the engine (rollout.vllm), or what copies responses",
        loss_fraction=step.loss_fraction,
        tolerance_source=f"a probability below {FALSE_ALARM:g} by chance",
    )


def _improbable_copies(groups: dict[int, Group]) -> list[list[ResponseIndex]]:
    """Return the responses that are several times in their group, by text.

    That two of N pairs are the same response, whose probability is below p, has by independent
    draws a probability below N p."""
    num_pairs = sum(math.comb(len(group.responses), 2) for group in groups.values())
    limit = math.log(FALSE_ALARM / 2 / num_pairs)
    copies: dict[tuple[int, bytes], list[ResponseIndex]] = {}
    for number, group in groups.items():
        for index, graded in enumerate(group.responses):
            if _response_logprob(group, index) < limit:
                tokens = graded.response.token_ids.tobytes()
                copies.setdefault((number, tokens), []).append((number, index))
    return [indices for indices in copies.values() if len(indices) > 1]


def _whole_groups(groups: dict[int, Group]) -> list[list[ResponseIndex]]:
    """Return the groups whose responses all are one, if so many are no chance.

    By independent draws the sum of `log_ratio_of_one_draw` exceeds -log q with a probability below
    q (Markov's inequality), as its exponential has the mean 1."""
    if sum(map(log_ratio_of_one_draw, groups.values())) < math.log(2 / FALSE_ALARM):
        return []
    return [
        [(number, index) for index in range(len(group.responses))]
        for number, group in groups.items()
        if _is_one_response(group)
    ]


def log_ratio_of_one_draw(group: Group) -> float:
    """Return log(P(one draw) / P(independent draws)) of a group, for one draw with probability 1/2.
    It is log((1 + p^(1 - n)) / 2) for n times a response of probability p, else log(1 / 2)."""
    log_ratio = -math.inf
    if _is_one_response(group):
        log_ratio = (1 - len(group.responses)) * _response_logprob(group, 0)
    return float(np.logaddexp(0.0, log_ratio)) - math.log(2)


def _is_one_response(group: Group) -> bool:
    return len({graded.response.token_ids.tobytes() for graded in group.responses}) == 1


def _response_logprob(group: Group, index: int) -> float:
    """Return the log-probability of a response's tokens, as its engine sampled them."""
    return math.fsum(group.responses[index].response.logprobs)
