"""Compares the reference policy in a checkpoint with the weights that the settings make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    ROUNDING_BY_DTYPE,
    Comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

POLICIES_STAGE = "log-probabilities"
"""Of the comparisons of the old policy (`trainer_logprobs`) and of its reference."""


def last_refresh(step: RecordedStep) -> int:
    """Return the step after which the reference was last replaced, before this one; 0: never."""
    config, refresh_step = step.run_config, 0
    for earlier_step in range(1, step.step):
        step_config = config.at(earlier_step)
        interval = step_config.rl.reference_refresh
        num_updates = config.updates_before(earlier_step + 1)
        if (
            interval
            and num_updates // interval > (num_updates - step_config.rl.minibatches) // interval
        ):
            refresh_step = earlier_step
    return refresh_step


def compare_reference(step: RecordedStep, recomputation: Recomputation) -> Comparison:
    """Compare the checkpoint's reference with the weights that the settings make it."""
    name = "reference policy"
    if not step.config.rl.kl_beta:
        return not_checked(POLICIES_STAGE, name, "rl.kl_beta: 0, there is none")
    if step.step == 1:
        return not_checked(POLICIES_STAGE, name, "it is the policy in the first step")
    from megatron_r1.why.policy import checkpoint_model

    # Adapters are small compared with the weights, and copies are exact.
    tolerance = ROUNDING_BY_DTYPE["float32"] if step.run_config.model.lora is None else 0.0
    refresh_step = last_refresh(step)
    expected_path = weights_after(step.folder, step.run_config, refresh_step)
    checkpoint_before = step.checkpoint_before
    if checkpoint_before is None:
        return not_checked(POLICIES_STAGE, name, f"there is no checkpoint of step {step.step - 1}")
    if not checkpoint_model.has_part(checkpoint_before, checkpoint_model.REFERENCE_PREFIX):
        return not_checked(POLICIES_STAGE, name, f"{checkpoint_before} has none")
    if expected_path is None:
        return not_checked(POLICIES_STAGE, name, f"there is no checkpoint of step {refresh_step}")
    reference = checkpoint_before, checkpoint_model.REFERENCE_PREFIX
    distance = recomputation.models.distance(reference, (expected_path, ""))
    if distance <= tolerance:
        return Comparison(
            POLICIES_STAGE,
            name,
            EQUAL,
            f"that of {checkpoint_before} with the weights after step {refresh_step}",
            distance,
            tolerance,
            "copies of one another",
        )
    reason = f"it is not the weights after step {refresh_step}, as rl.reference_refresh makes it"
    other_steps = {0, step.step - 1, *range(max(0, step.step - 4), step.step)} - {refresh_step}
    for other_step in sorted(other_steps):
        path = weights_after(step.folder, step.run_config, other_step)
        if path and recomputation.models.distance(reference, (path, "")) <= tolerance:
            text = (
                "it was not refreshed"
                if other_step < refresh_step
                else "it was refreshed too often"
            )
            reason += f": {text}, it is the weights after step {other_step}"
            break
    return Comparison(
        POLICIES_STAGE,
        name,
        DEPARTS,
        f"that of {checkpoint_before} with the weights after step {refresh_step}",
        distance,
        tolerance,
        "copies of one another",
        reason,
        remedy=f"rl.reference_refresh: {step.config.rl.reference_refresh}",
    )
