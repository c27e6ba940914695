"""Finds figures of a run that may explain its course where no check departs. A suspicion is not a
cause: it is what the run's own numbers allow, with the figures that speak for it."""

import math
from statistics import fmean

from megatron_r1.controller.rollouts.rollout import all_responses
from megatron_r1.reporting.formatting import format_number, format_percent
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.record.recorded_step import RecordedStep

MAX_EQUAL_FRACTION, MAX_CUT_FRACTION = 0.5, 0.25
END_FRACTION = 0.1
"""Share of a run's steps whose mean stands for its beginning, and for its end."""
MIN_ENTROPY_FRACTION = 0.2
"""An entropy that has fallen below this fraction of what it was at first."""
SMALL_KL = 1e-4


def find_suspicions(step: RecordedStep) -> list[str]:
    """Return one sentence per figure that may explain the run's course, or one that none does."""
    texts = [
        _equal_groups_suspicion(step),
        _truncation_suspicion(step),
        _entropy_suspicion(step),
        _learning_rate_suspicion(step),
    ]
    sentences = [suspicion for suspicion in texts if suspicion]
    return sentences or ["no figure of the run stands out: too few steps, or the task is learned"]


def _equal_groups_suspicion(step: RecordedStep) -> str:
    groups = step.groups + step.filtered_groups
    fraction = fmean(group.has_equal_rewards for group in groups)
    accuracies = [graded.rewards.get("accuracy", 0.0) for graded in all_responses(groups)]
    if fraction < MAX_EQUAL_FRACTION:
        return ""
    accuracy = fmean(accuracies)
    text = "too hard" if accuracy < 0.5 else "learned already"
    return (
        f"the task is {text}: {format_percent(fraction)} of the groups have one reward for all "
        f"responses and teach nothing (accuracy {format_percent(accuracy)}): other questions, a "
        "larger rl.group_size, or rl.dynamic_sampling"
    )


def _truncation_suspicion(step: RecordedStep) -> str:
    cut_responses = [index for index, graded in step.responses.items() if graded.is_truncated]
    fraction = len(cut_responses) / len(step.responses)
    if fraction < MAX_CUT_FRACTION:
        return ""
    weight = step.loss_fraction(cut_responses)
    loss_text = "" if math.isnan(weight) else f", and have {format_percent(weight)} of the loss"
    return (
        f"{format_percent(fraction)} of the responses are cut off at rollout.max_response_tokens="
        f"{step.config.rollout.max_response_tokens}{loss_text}: raise it"
    )


def _first_and_last_means(step: RecordedStep, key: str) -> tuple[float, float] | None:
    """Return the mean of a metric over the first and the last steps up to this one."""
    lines = [line for line in step.folder.read_metrics() if line["step"] <= step.step]
    values = [value for line in lines if (value := finite_metric(line, key)) is not None]
    count = max(1, int(END_FRACTION * len(values)))
    return (fmean(values[:count]), fmean(values[-count:])) if values else None


def _entropy_suspicion(step: RecordedStep) -> str:
    ends = _first_and_last_means(step, "entropy")
    if ends is None or ends[1] >= MIN_ENTROPY_FRACTION * ends[0]:
        return ""
    return (
        f"the policy has little left to try: its entropy fell from {format_number(ends[0])} to "
        f"{format_number(ends[1])} nats per token: rl.clip_high above rl.clip_low, "
        "rl.entropy_coef, a higher rollout.temperature, or fewer steps"
    )


def _learning_rate_suspicion(step: RecordedStep) -> str:
    rate, warmup = max(step.learning_rates), step.config.optimizer.warmup_updates
    if warmup and step.updates_after(step.step) <= warmup:
        return (
            f"the learning rate is still warming up, {rate:.3g} of "
            f"{step.config.optimizer.learning_rate:.3g}: optimizer.warmup_updates: {warmup}"
        )
    rewards, kl = _first_and_last_means(step, "reward/mean"), finite_metric(step.metrics_row, "kl")
    if rewards is None or step.step < 10 or rewards[1] > rewards[0]:
        return ""
    if kl is not None and step.config.rl.kl_beta and kl < SMALL_KL:
        return (
            f"the learning rate is too low: after {step.step} steps the policy is "
            f"{format_number(kl)} nats per token from its reference: optimizer.learning_rate: "
            f"{rate:.3g}"
        )
    return (
        f"the reward did not rise in {step.step} steps ({format_number(rewards[0])}, then "
        f"{format_number(rewards[1])}): another optimizer.learning_rate ({rate:.3g}), up or down"
    )
