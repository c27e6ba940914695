"""The log-probabilities of a fresh engine, against the logged ones and those of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.why.checks import engine_logprobs
from megatron_r1.why.checks.engine_gaps import EngineGaps, mean_gap
from megatron_r1.why.checks.rerun_kind import Rerun, rerun_comparison, run_in_scratch_folder
from megatron_r1.why.checks.sampling import STAGE
from megatron_r1.why.comparison import CannotRecompute, Comparison
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.readings import Distances, Reading, engine_reading

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation


def _check_engine(
    step: RecordedStep, recomputation: Recomputation, refined_comparison: Comparison
) -> tuple[Comparison, Reading]:
    """Compare a fresh engine's log-probabilities with the logged ones and transformers'.

    A rerun scores tokens as parts of a prompt, which vLLM does at temperature 1 over the whole
    vocabulary. Where the run sampled otherwise, it is compared with transformers alone."""
    from megatron_r1.why.policy.policy_export import write_policy
    from megatron_r1.why.rerun import fresh_engine

    fresh_engine.check_engine(
        step, recomputation.models.num_parameters, recomputation.models.free_bytes
    )
    gaps = EngineGaps(step, recomputation.policies)

    async def score(scratch: Path) -> list[np.ndarray]:
        folder = scratch / "hf"
        folder.mkdir()
        write_policy(
            step, recomputation.models.num_parameters, folder, recomputation.models.free_bytes
        )
        return await fresh_engine.score(step.run_config, folder, gaps.sequences, scratch)

    fresh_logprobs = run_in_scratch_folder(score)
    rollout = step.config.rollout
    is_scored_alike = rollout.temperature == 1.0 and not rollout.truncates_sampling
    transformers_logprobs = (
        recomputation.policies.old_logprobs
        if is_scored_alike
        else recomputation.policies.plain_logprobs()
    )
    distances = _engine_distances(
        gaps, fresh_logprobs, transformers_logprobs, refined_comparison, is_scored_alike
    )
    reading = engine_reading(distances, gaps.tolerance, refined_comparison.differs)
    subject = f"of the same tokens; mean |Δ|: {distances.text('fresh engine')}"
    if not is_scored_alike:
        subject += (
            f" (an engine scores given tokens at temperature 1 from the whole vocabulary, the run "
            f"sampled at temperature {rollout.temperature:g}"
            f"{', from a part of it' if rollout.truncates_sampling else ''})"
        )
    return rerun_comparison(ENGINE, subject, distances, gaps.tolerance, reading), reading


def _engine_distances(
    gaps: EngineGaps,
    fresh_logprobs: Sequence[np.ndarray],
    transformers_logprobs: Sequence[np.ndarray],
    refined_comparison: Comparison,
    is_scored_alike: bool,
) -> Distances:
    """Return the distances over the tokens of the newest version, of the responses that depart
    where some do.

    Args:
        gaps: the logged log-probabilities' differences from transformers'.
        fresh_logprobs: the fresh engine's log-probabilities.
        transformers_logprobs: transformers', at temperature 1 over the whole vocabulary.
        refined_comparison: the comparison of the logged ones.
        is_scored_alike: whether the run sampled at temperature 1 from the whole vocabulary.

    Raises:
        CannotRecompute: no token is of the version before the step."""
    departing_responses = (
        set(refined_comparison.affected_responses) if refined_comparison.differs else set()
    )

    def mean(differences: Sequence[np.ndarray]) -> float:
        return mean_gap(
            [
                difference
                for difference, sequence in zip(differences, gaps.sequences, strict=True)
                if not departing_responses or sequence.response in departing_responses
            ]
        )

    logged_gaps = gaps.gaps_from(gaps.policies.old_logprobs)
    fresh_gaps = [
        np.where(np.isnan(gap), np.nan, sequence_logprobs - plain_logprobs)
        for gap, sequence_logprobs, plain_logprobs in zip(
            logged_gaps, fresh_logprobs, transformers_logprobs, strict=True
        )
    ]
    distances = Distances(
        mean(logged_gaps),
        mean(gaps.gaps_from(fresh_logprobs)) if is_scored_alike else math.nan,
        mean(fresh_gaps),
    )
    if math.isnan(distances.recorded_to_transformers) or math.isnan(
        distances.rerun_to_transformers
    ):
        raise CannotRecompute(f"no token to compare is of version {gaps.newest_version}")
    return distances


ENGINE = Rerun(
    STAGE,
    "a fresh engine's log-probabilities",
    engine_logprobs.NAME,
    "starting an engine",
    _check_engine,
)
