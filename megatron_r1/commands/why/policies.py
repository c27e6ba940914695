"""The trainer's old log-probabilities, and its reference, against checkpoints before the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.commands.compare.records import ROUNDING
from megatron_r1.commands.why.finding import DEPARTS, EQUAL, Finding, not_checked
from megatron_r1.commands.why.recorded import RecordedStep, weights_after
from megatron_r1.reporting.wording import format_number as number

if TYPE_CHECKING:
    from megatron_r1.commands.why.recompute import Recomputation

POLICIES = "log-probabilities"


def check_policies(step: RecordedStep, recomputed: Recomputation) -> list[Finding]:
    """Return the findings of the trainer's log-probabilities and of its reference."""
    return [_trainer(step, recomputed), _reference(step, recomputed)]


def _trainer(step: RecordedStep, recomputed: Recomputation) -> Finding:
    """Compare logprob_diff/mean, engine's against trainer's, with engine's against transformers."""
    name = "old policy of the trainer"
    logged = step.line.get("logprob_diff/mean")
    if not isinstance(logged, int | float):
        return not_checked(POLICIES, name, "metrics.jsonl has no logprob_diff/mean")
    if len(recomputed.with_logprobs) < len(recomputed.rows):
        return not_checked(POLICIES, name, "only a part of the responses is recomputed here")
    gaps = [
        np.abs(sequence.logprobs - own)
        for sequence, own in zip(recomputed.sequences, recomputed.old, strict=True)
        if not math.isnan(sequence.advantage)
    ]
    own = float(np.concatenate(gaps).mean())
    tolerance = ROUNDING[step.run_config.model.dtype]
    distance = abs(own - logged)
    return Finding(
        POLICIES,
        name,
        EQUAL if distance <= tolerance else DEPARTS,
        f"mean |engine - trainer| {number(logged)} with mean |engine - transformers| {number(own)}",
        distance,
        tolerance,
        "rounding of model.dtype (docs/compare.md)",
        f"the trainer is {number(logged)} from the engine, transformers {number(own)}: the trainer "
        "computes old log-probabilities of other weights, or at another temperature",
        remedy="rollout.temperature in rl.schedule, model.fusions, fp8, parallel; megatron-r1 "
        "check-model with this layout",
    )


def last_refresh(step: RecordedStep) -> int:
    """Return the step after which the reference was last replaced, before this one; 0: never."""
    config, found = step.run_config, 0
    for earlier in range(1, step.step):
        at = config.at(earlier)
        every, done = at.rl.reference_refresh, config.updates_before(earlier + 1)
        if every and done // every > (done - at.rl.minibatches) // every:
            found = earlier
    return found


def _reference(step: RecordedStep, recomputed: Recomputation) -> Finding:
    """Compare the checkpoint's reference with the weights that the settings make it."""
    name = "reference policy"
    if not step.config.rl.kl_beta:
        return not_checked(POLICIES, name, "rl.kl_beta: 0, there is none")
    if step.step == 1:
        return not_checked(POLICIES, name, "it is the policy in the first step")
    from megatron_r1.commands.why import replay

    refreshed = last_refresh(step)
    expected = weights_after(step.folder, step.run_config, refreshed)
    before = step.before
    if before is None:
        return not_checked(POLICIES, name, f"there is no checkpoint of step {step.step - 1}")
    if not replay.has_part(before, replay.REFERENCE):
        return not_checked(POLICIES, name, f"{before} has none")
    if expected is None:
        return not_checked(POLICIES, name, f"there is no checkpoint of step {refreshed}")
    own = recomputed.model(before, replay.REFERENCE)
    distance = _apart(own, recomputed.model(expected))
    if distance <= ROUNDING["float32"]:
        return Finding(
            POLICIES,
            name,
            EQUAL,
            f"that of {before} with the weights after step {refreshed}",
            distance,
            ROUNDING["float32"],
            "copies of one another",
        )
    reason = f"it is not the weights after step {refreshed}, as rl.reference_refresh makes it"
    others = {0, step.step - 1, *range(max(0, step.step - 4), step.step)} - {refreshed}
    for other in sorted(others):
        path = weights_after(step.folder, step.run_config, other)
        if path and _apart(own, recomputed.model(path)) <= ROUNDING["float32"]:
            what = "it was not refreshed" if other < refreshed else "it was refreshed too often"
            reason += f": {what}, it is the weights after step {other}"
            break
    return Finding(
        POLICIES,
        name,
        DEPARTS,
        f"that of {before} with the weights after step {refreshed}",
        distance,
        ROUNDING["float32"],
        "copies of one another",
        reason,
        remedy=f"rl.reference_refresh: {step.config.rl.reference_refresh}",
    )


def _apart(a: object, b: object) -> float:
    """Return |a - b| / |b| over all parameters of two models."""
    from megatron_r1.commands.why import replay

    return replay.relative_distance(a, b)
