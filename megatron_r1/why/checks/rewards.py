"""Compares the rewards that a step logged with their terms and the metrics that are made of
them."""

import math
from statistics import fmean

import numpy as np
from r1_grading.terms import ACCURACY

from megatron_r1.controller.rollouts.rollout import all_responses
from megatron_r1.reporting.formatting import format_number
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.checks.regraded_rewards import (
    FAMILY,
    REWARD_TOLERANCE,
    compare_regraded_rewards,
    compare_reward_order,
    grade_again,
)
from megatron_r1.why.checks.second_reader import compare_accuracies
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.formulas import are_equal
from megatron_r1.why.record.recorded_step import RecordedStep


def compare_recorded_rewards(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of a step's rewards."""
    new_grades = grade_again(step)
    return [
        _compare_sums(step),
        compare_reward_order(step, new_grades),
        compare_accuracies(step),
        compare_regraded_rewards(step, new_grades),
        *_compare_metrics(step),
    ]


def _compare_sums(step: RecordedStep) -> Comparison:
    """Check that rewards are the weighted sums of their terms."""
    departing_responses: list[ResponseIndex] = []
    worst, reason = 0.0, ""
    for index, graded in step.responses.items():
        if not graded.is_graded:
            continue
        total = sum(
            step.reward_weights.get(term, 0.0) * value for term, value in graded.rewards.items()
        )
        if (gap := abs(total - graded.reward)) > REWARD_TOLERANCE:
            departing_responses.append(index)
            if gap > worst:
                worst = gap
                terms = ", ".join(f"{k} {v:g}" for k, v in graded.rewards.items())
                cut = ", of a response that is cut off" if graded.is_truncated else ""
                reason = f"reward {graded.reward:g}{cut} is not {total:g}, the sum of {terms}"
    if departing_responses and all(
        step.responses[index].is_truncated for index in departing_responses
    ):
        reason = f"{len(departing_responses):,} truncated answers are punished: {reason}"
    elif departing_responses and all(
        abs(_plain_sum(step, index) - step.responses[index].reward) <= REWARD_TOLERANCE
        for index in departing_responses
    ):
        reason = f"rewards are the sums of the terms without their weights: {reason}"
    return fraction_comparison(
        FAMILY,
        "sum of the terms",
        f"{len(step.responses):,} rewards with rewards.weights "
        + ", ".join(f"{term} {weight:g}" for term, weight in step.reward_weights.items()),
        departing_responses,
        len(step.responses),
        reason=reason,
        remedy="rewards.weights, or what changes a reward after the graders",
        loss_fraction=step.loss_fraction,
    )


def _plain_sum(step: RecordedStep, index: ResponseIndex) -> float:
    terms = step.responses[index].rewards
    return sum(value for term, value in terms.items() if step.reward_weights.get(term))


def _compare_metrics(step: RecordedStep) -> list[Comparison]:
    """Compare means over the logged responses with metrics.jsonl."""
    groups = step.groups + step.filtered_groups
    responses = all_responses(groups)
    rewards = [graded_response.reward for graded_response in responses if graded_response.is_graded]
    accuracies = [
        graded_response.rewards[ACCURACY]
        for graded_response in responses
        if ACCURACY not in graded_response.ungraded_terms
    ]
    num_equal = sum(
        are_equal(np.array([r.reward for r in group.responses if r.is_graded])) for group in groups
    )
    means = {
        "reward/mean": fmean(rewards) if rewards else 0.0,
        "accuracy": fmean(accuracies) if accuracies else 0.0,
        "response_length/mean": fmean(
            len(graded_response.response.token_ids) for graded_response in responses
        ),
        "truncated": fmean(graded_response.is_truncated for graded_response in responses),
        "groups/zero_variance": num_equal / len(groups),
    }
    gaps = {
        name: math.inf
        if (logged := finite_metric(step.metrics_row, name)) is None
        else abs(logged - mean)
        for name, mean in means.items()
        if name in step.metrics_row
    }
    subject = f"the means of {len(responses):,} responses with metrics.jsonl"
    if not gaps:
        return [not_checked(FAMILY, "metrics of the rollout", "metrics.jsonl has none")]
    worst = max(gaps, key=lambda name: gaps[name])
    is_equal = gaps[worst] <= REWARD_TOLERANCE * max(1.0, abs(means[worst]))
    return [
        Comparison(
            FAMILY,
            "metrics of the rollout",
            EQUAL if is_equal else DEPARTS,
            subject,
            gaps[worst],
            REWARD_TOLERANCE * max(1.0, abs(means[worst])),
            "sums in float64",
            f"{worst} is {_describe_logged(step, worst)} in metrics.jsonl and "
            f"{format_number(means[worst])} in the sample log: they are not of the same responses",
            remedy="metrics.jsonl or sample_log/: one of them was changed, or belongs to a run "
            "that went on from an earlier checkpoint",
        )
    ]


def _describe_logged(step: RecordedStep, name: str) -> str:
    value = finite_metric(step.metrics_row, name)
    return "not a number" if value is None else format_number(value)
