"""Searches the cause of updates that depart: tries one candidate cause at a time, until the updates
with it are what the run recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_r1.why.checks.update_tolerances import are_recorded, explains_record, update_limit
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.advantage_causes import advantage_causes
from megatron_r1.why.update.fitted_causes import clip_cause, fitted_causes
from megatron_r1.why.update.loss_causes import default_causes, kl_causes, loss_causes
from megatron_r1.why.update.optimizer_causes import optimizer_causes
from megatron_r1.why.update.sample_causes import sample_causes

if TYPE_CHECKING:
    from megatron_r1.why.update.candidate_cause import CandidateCause
    from megatron_r1.why.update.recomputation import Recomputation, RecomputedUpdates

CLEAR_CAUSE_FACTOR = 64
"""A cause whose distance is the tolerance over this, or less, is clear: other values of its setting
are not tried."""
ESTIMATE_DIGITS = 3
"""Decimal places of an estimate. Those that differ by less, by rounding, are of candidates that do
the same, as the group's deviation and a factor of 2 do where every deviation is 1/2."""
MAX_OTHER_VALUES = 3
"""Other values of one setting that are tried where one explains a departure."""


def candidate_causes(step: RecordedStep, recomputation: Recomputation) -> Iterator[CandidateCause]:
    """Yield the candidate causes of updates that depart, each one thing.

    Args:
        step: what the run recorded of it.
        recomputation: its updates as the settings say."""
    rl = step.config.rl
    if rl.kl_beta and not step.rules.kl_in_reward:
        yield from kl_causes(step)
    yield from loss_causes(step)
    yield from advantage_causes(step, recomputation.run_differences)
    yield from sample_causes(step, recomputation)
    yield from optimizer_causes(step)
    yield from fitted_causes(step, recomputation.run_differences)
    yield from default_causes(step)


def find_update_cause(
    step: RecordedStep, recomputation: Recomputation, candidates: Sequence[CandidateCause]
) -> tuple[CandidateCause, RecomputedUpdates] | None:
    """Return the first candidate that explains what was recorded, and the updates with it.

    Candidates are tried in the order of an estimate that needs no model, those of equal estimates
    in the order given. Several values of one setting may be within the tolerance; the one nearest
    to the checkpoint after the step is returned. The norm that gradients were clipped to comes
    last, as it takes several recomputations to fit.

    Args:
        step: what the run recorded of it.
        recomputation: its updates.
        candidates: `candidate_causes` of the step."""
    estimates = [
        round(recomputation.estimates.distance(candidate, step.metrics_row), ESTIMATE_DIGITS)
        for candidate in candidates
    ]
    order = sorted(range(len(candidates)), key=lambda index: (estimates[index], index))
    matches_record = partial(are_recorded, step)
    for index in order:
        first, updates = candidates[index], recomputation.run(candidates[index], matches_record)
        if updates is None or not explains_record(step, updates):
            continue
        causes = [(first, updates)]
        if (
            updates.update_distance is not None
            and updates.update_distance > update_limit(step) / CLEAR_CAUSE_FACTOR
        ):
            other_candidates = [
                candidate
                for candidate in (candidates[other] for other in order)
                if candidate.setting == first.setting and candidate != first
            ]
            other_values = [
                (candidate, recomputation.run(candidate, matches_record))
                for candidate in other_candidates[:MAX_OTHER_VALUES]
            ]
            causes += [
                (candidate, other_updates)
                for candidate, other_updates in other_values
                if other_updates is not None and explains_record(step, other_updates)
            ]
        return min(
            causes,
            key=lambda pair: (pair[1].update_distance or 0.0) + (pair[1].moment_distance or 0.0),
        )
    if (clip := recomputation.fitted_clip) is not None:
        updates = recomputation.run(fitted := clip_cause(clip), matches_record)
        if updates is not None and explains_record(step, updates):
            return fitted, updates
    return None
