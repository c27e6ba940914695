"""Compares the learning rate and the number of updates of a step with its settings."""

import math

from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.checks.loss import COMPARED_METRICS
from megatron_r1.why.comparison import DEPARTS, EQUAL, Comparison, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep

SCHEDULE = "schedule"
LEARNING_RATE_TOLERANCE = 1e-6
"""The largest relative distance of learning rates, which are a few products of float64."""


def compare_schedule(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of the schedule, from metrics.jsonl alone."""
    return [_compare_rate(step), _compare_count(step), _compare_taken_updates(step)]


def _compare_rate(step: RecordedStep) -> Comparison:
    name, logged_rate = "learning rate", finite_metric(step.metrics_row, "learning_rate")
    if "learning_rate" not in step.metrics_row:
        return not_checked(SCHEDULE, name, "metrics.jsonl has no learning_rate")
    if logged_rate is None:
        return _not_a_number(name, "learning_rate")
    rates = step.learning_rates
    mean_rate = sum(rates) / len(rates)
    distance = abs(mean_rate - logged_rate) / mean_rate if mean_rate else abs(logged_rate)
    settings, steps = step.config.optimizer, step.scheduled_steps
    total_steps = "" if steps == step.run_config.run.steps else f" over run.steps: {steps}"
    reason = f"learning_rate is {logged_rate:g} in metrics.jsonl, the schedule says {mean_rate:g}"
    if settings.warmup_updates and logged_rate < mean_rate:
        reason += ": as if still in warm-up"
    return Comparison(
        SCHEDULE,
        name,
        EQUAL if distance <= LEARNING_RATE_TOLERANCE else DEPARTS,
        f"{logged_rate:g} of metrics.jsonl with {mean_rate:g} by the schedule{total_steps}",
        distance,
        LEARNING_RATE_TOLERANCE,
        "float64",
        reason,
        remedy="optimizer.learning_rate, warmup_updates, decay, min_learning_rate, or run.steps, "
        "which the decay is over",
    )


def _compare_count(step: RecordedStep) -> Comparison:
    name, logged_count = "number of updates", step.metrics_row.get("optimizer_step")
    if "optimizer_step" not in step.metrics_row:
        return not_checked(SCHEDULE, name, "metrics.jsonl has no optimizer_step")
    if not isinstance(logged_count, int):
        return _not_a_number(name, "optimizer_step")
    num_updates = step.updates_after(step.step)
    return Comparison(
        SCHEDULE,
        name,
        EQUAL if num_updates == logged_count else DEPARTS,
        f"optimizer_step {logged_count:,} with {num_updates:,} by rl.minibatches",
        float(abs(num_updates - logged_count)),
        0.0,
        "exact",
        f"optimizer_step is {logged_count:,}, {num_updates:,} updates were due: the schedule is "
        "behind",
        remedy="rl.minibatches or rl.schedule were changed on the way, or the counter was lost",
    )


def _compare_taken_updates(step: RecordedStep) -> Comparison:
    name, taken_fraction = "updates taken", finite_metric(step.metrics_row, "step_taken")
    if "step_taken" not in step.metrics_row:
        return not_checked(SCHEDULE, name, "metrics.jsonl has no step_taken")
    if taken_fraction is None:
        return _not_a_number(name, "step_taken")
    norm = finite_metric(step.metrics_row, "grad_norm")
    parts = ["a gradient is not finite: its update was left out"] if taken_fraction < 1 else []
    if missing_keys := [
        key for key in (*COMPARED_METRICS, "grad_norm") if _is_no_number(step, key)
    ]:
        parts.append(f"not a number in metrics.jsonl: {', '.join(dict.fromkeys(missing_keys))}")
    return Comparison(
        SCHEDULE,
        name,
        EQUAL if taken_fraction == 1 and norm is not None else DEPARTS,
        f"step_taken {taken_fraction:g}, grad_norm {norm}",
        1 - taken_fraction,
        0.0,
        "exact",
        "; ".join(parts),
        remedy="what makes NaN in the trainer: the loss, model.dtype, model.fusions, fp8",
    )


def _is_no_number(step: RecordedStep, key: str) -> bool:
    return key in step.metrics_row and finite_metric(step.metrics_row, key) is None


def _not_a_number(name: str, key: str) -> Comparison:
    """Return the comparison of a metric that is null."""
    return Comparison(
        SCHEDULE,
        name,
        DEPARTS,
        f"{key} of metrics.jsonl",
        math.inf,
        0.0,
        "exact",
        f"{key} is not a number in metrics.jsonl",
        remedy="the trainer, or what changed metrics.jsonl",
    )
