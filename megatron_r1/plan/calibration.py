"""The assumed numbers that a run folder determines (`--calibrate-from`).

Lengths are read from its metrics. Each other number is solved for: the value with which the plan of
the run's own recipe takes the measured seconds. Seconds are medians over the steps without the
first, which warms up, and before the first change of rl.schedule."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.json_lines import read_lines
from megatron_r1.plan.calibration_file import GPUS, RELATIVE_TO
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import described_fields
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import drafts_with_mtp, has_push
from megatron_r1.plan.recipe_job import planned_job
from megatron_r1.plan.rollout import mean_pass_tokens
from megatron_r1.plan.timing import time_section
from megatron_r1.reporting.formatting import format_count
from megatron_r1.reporting.record_values import finite_metric

BISECTIONS = 60
EFFICIENCY_LIMITS = (1e-12, 1.0)
"""The limits between which a value is sought: a share, or seconds of a layer."""


def calibrate_from(
    folder: Path, file: Path, args: argparse.Namespace, overrides: dict[str, Any]
) -> str:
    """Write the values that a run determines; return what was derived and what not.

    Args:
        folder: the run's folder.
        file: the YAML file to write, for --calibrate.
        args: the options of the command line.
        overrides: dotted settings in place of the run's.

    Raises:
        UserError: the run determines no value, or `file` cannot be written."""
    calibration = RunCalibration(folder, planned_job(folder / "config.yaml", args, overrides, 1))
    values, reasons = calibration.values, calibration.reasons
    if not values:
        explanation = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(
            f"--calibrate-from {folder}: nothing can be derived: {explanation}",
            key="--calibrate-from",
            cause=Cause.EMPTY,
        )
    hardware, num_gpus = calibration.job.hardware.name, calibration.job.num_gpus
    steps = f"{format_count(len(calibration.lines), 'step')} of {folder}"
    title = f"# From {steps}. Shares are of the rates of {hardware}.\n"
    text = yaml.safe_dump({RELATIVE_TO: hardware, GPUS: num_gpus, **values}, sort_keys=False)
    try:
        atomic_write(file, title + text)
    except OSError as error:
        raise UserError(
            f"--calibrate-from: {file} cannot be written: {error.strerror}",
            key="--calibrate-from",
            cause=Cause.UNREADABLE,
        ) from None
    default_reason = "the metrics do not say"
    rows = [f"{file}: from {steps}, for {hardware}"]
    rows += [f"  {name:24}  {value:.4g}" for name, value in values.items()]
    rows += ["not derived:"]
    names = [name for name in described_fields(calibration.job.assumptions) if name not in values]
    rows += [f"  {name:24}  {reasons.get(name, default_reason)}" for name in names]
    return "\n".join([*rows, "  rates of the hardware     measure each link alone"])


def draft_acceptance(length: float, num_drafts: int) -> float:
    """Return the probability with which a drafted token is accepted if all drafts before it are.

    It is the one at which a pass yields `length` tokens of a sequence on average.

    Args:
        length: mean tokens of a sequence in a pass, above 1.
        num_drafts: drafted tokens of a pass."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_below = mean_pass_tokens(middle, num_drafts) < length
        low, high = (middle, high) if is_below else (low, middle)
    return high


class RunCalibration:
    """The values that a run determines.

    Attributes:
        values: the values, by name.
        reasons: why others are not there, by name.
        job: the run's job, with its lengths and the values found so far."""

    def __init__(self, folder: Path, job: PlannedJob):
        self.values: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self.job = job
        changes = [entry.from_step for entry in job.config.rl.schedule if entry.from_step > 1]
        first_change = min(changes, default=math.inf)
        lines = [
            line for line in read_lines(folder / "metrics.jsonl") if line["step"] < first_change
        ]
        if not lines:
            raise UserError(
                f"--calibrate-from {folder}: metrics.jsonl is missing or has no step",
                key="--calibrate-from",
                cause=Cause.EMPTY,
            )
        self.lines = lines[1:] or lines
        self._set_lengths()
        self._fit_assumption("compute_efficiency", "time/train", "logprobs", "training", "critic")
        self.reasons["link_efficiency"] = "time/train is computation and communication together"
        if job.generates:
            self._set_draft_acceptance()
            self._fit_rollout()
        if has_push(job):
            self._fit_assumption("push_efficiency", "time/push", "push")

    def _run_median(self, key: str) -> float | None:
        values = [value for line in self.lines if (value := finite_metric(line, key)) is not None]
        return median(values) if values else None

    def _set_lengths(self) -> None:
        """Set the job's lengths to the run's: tokens of a sample from how full the micro-batches
        were (packing/fill), of a response from its own metric."""
        job, mean = self.job, self._run_median("response_length/mean")
        fill, count = self._run_median("packing/fill"), self._run_median("packing/microbatches")
        sample = None
        if fill and count:
            limit = job.parallel.microbatch_tokens
            sample = (
                fill
                * limit
                * count
                * job.data_parallel_size
                * job.num_minibatches
                / job.num_responses
            )
        if mean and job.generates:
            response, longest = max(1, round(mean)), self._run_median("response_length/max") or mean
            self.values["response_fraction"] = min(1.0, mean / job.max_response_tokens)
            changes = {"max_response_tokens": max(response, round(longest))}
            config = job.config.with_changes(rollout=changes)
            self.job = replace(job, config=config, response_tokens=response)
            if sample and sample > mean:
                self.values["prompt_tokens"] = prompt = max(1, round(sample - mean))
                self.job = self._changed_job(prompt_tokens=prompt)
        elif sample and sample >= 2:
            prompt = min(job.assumptions.prompt_tokens, round(sample) - 1)
            self.job = replace(
                self._changed_job(prompt_tokens=prompt), response_tokens=round(sample) - prompt
            )

    def _changed_job(self, **values: Any) -> PlannedJob:
        return replace(self.job, assumptions=replace(self.job.assumptions, **values))

    def _planned_seconds(self, parts: tuple[str, ...], **values: float) -> float | None:
        """Return the sum of the planned seconds of `parts` with these values."""
        section = time_section(JobEstimate(self._changed_job(**values)).times)
        part_seconds = [section[name].value for name in parts if name in section]
        return None if not part_seconds or None in part_seconds else sum(filter(None, part_seconds))

    def _set_draft_acceptance(self) -> None:
        """Set the acceptance with which a pass gives as many tokens as it did."""
        if not drafts_with_mtp(self.job):
            self.reasons["draft_acceptance"] = "no MTP layer drafts"
            return
        if not (length := self._run_median("speculative/length")) or length <= 1:
            self.reasons["draft_acceptance"] = "the metrics have no right drafts"
            return
        acceptance = draft_acceptance(length, self.job.config.rollout.speculative.tokens)
        self.values["draft_acceptance"] = acceptance
        self.job = self._changed_job(draft_acceptance=acceptance)

    def _fit_rollout(self) -> None:
        """One number of seconds determines one of two: engines of one GPU have no exchanges."""
        has_exchanges = self.job.engine_gpus > 1
        names = "decode_latency_per_layer", "bandwidth_efficiency"
        fitted_name, other_name = names if has_exchanges else names[::-1]
        self._fit_assumption(fitted_name, "time/rollout", "rollout")
        self.reasons[other_name] = (
            f"time/rollout was used for {fitted_name}"
            if has_exchanges
            else "engines have one GPU each"
        )

    def _fit_assumption(self, name: str, key: str, *parts: str) -> None:
        """Set `name` to the value with which `parts` of the plan take the median of `key`."""
        measured_seconds = self._run_median(key)
        if not measured_seconds:
            self.reasons[name] = f"the metrics have no {key}"
            return
        low, high = EFFICIENCY_LIMITS
        seconds_at_low, seconds_at_high = (
            self._planned_seconds(parts, **{name: value}) for value in EFFICIENCY_LIMITS
        )
        if seconds_at_low is None or seconds_at_high is None:
            self.reasons[name] = "the run does not fit on this hardware as planned"
            return
        shortest, longest = sorted((seconds_at_low, seconds_at_high))
        if not shortest < measured_seconds < longest:
            self.reasons[name] = (
                f"no value explains {key}: {measured_seconds:.3g} s; the plan has "
                f"{shortest:.3g} to {longest:.3g} s"
            )
            return
        is_falling = seconds_at_low > seconds_at_high
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            too_long = (self._planned_seconds(parts, **{name: middle}) or 0.0) > measured_seconds
            low, high = (middle, high) if too_long == is_falling else (low, middle)
        self.values[name] = low
        self.job = self._changed_job(**{name: low})
