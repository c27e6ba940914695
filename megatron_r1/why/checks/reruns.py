"""Makes the reruns of `--rerun`: log-probabilities again, by a fresh engine and by one trainer
rank. Each refines a comparison: it says which side a departure is on."""

from __future__ import annotations

import asyncio
import math
import signal
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from megatron_r1.base.errors import UserError
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.checks import engine_logprobs, reference_weights, trainer_logprobs
from megatron_r1.why.checks.engine_gaps import EngineGaps, mean_gap
from megatron_r1.why.checks.sampling import FAMILY
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    NOT_CHECKED,
    ROUNDING_BY_DTYPE,
    CannotRecompute,
    Comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.rerun_verdicts import (
    HINT,
    Distances,
    RerunVerdict,
    absolute_distance,
    engine_verdict,
    trainer_verdict,
)
from megatron_r1.why.step_report import Report

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

T = TypeVar("T")


class Rerun(NamedTuple):
    """A kind of rerun.

    Attributes:
        family: the family of its comparison, and of the one that it refines.
        name: the quantity that it compares.
        refines: the name of the comparison that it refines.
        start: what is started, for a message.
        check: makes it."""

    family: str
    name: str
    refines: str
    start: str
    check: Callable[[RecordedStep, Recomputation, Comparison], tuple[Comparison, RerunVerdict]]


def rerun_comparison(
    rerun: Rerun, subject: str, distances: Distances, tolerance: float, verdict: RerunVerdict
) -> Comparison:
    """Return the comparison of a rerun with transformers.

    Args:
        rerun: its kind.
        subject: what is compared, with the distances as text.
        distances: those between the run, transformers and the rerun.
        tolerance: the largest distance that is rounding.
        verdict: what the distances say."""
    text = f"{subject}; {verdict.conclusion}"
    return Comparison(
        rerun.family,
        rerun.name,
        DEPARTS if verdict.departs else EQUAL,
        text,
        distances.rerun_to_transformers,
        tolerance,
        "rounding of the dtype (docs/compare.md)",
        text if verdict.departs else "",
        remedy=verdict.remedy if verdict.departs else "",
    )


def run_in_scratch_folder(work: Callable[[Path], Coroutine[Any, Any, T]]) -> T:
    """Run what starts processes, in a temporary folder that is removed; SIGTERM and Ctrl-C end it
    after it has stopped them.

    Args:
        work: what is run, given the folder.

    Raises:
        KeyboardInterrupt: a signal has ended it."""

    async def run(scratch: Path) -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work(scratch)

    with tempfile.TemporaryDirectory(prefix="megatron-r1-why-") as scratch:
        try:
            return asyncio.run(run(Path(scratch)))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def _compare_fresh_engine(
    step: RecordedStep, recomputation: Recomputation, refined_comparison: Comparison
) -> tuple[Comparison, RerunVerdict]:
    """Compare a fresh engine's log-probabilities with the logged ones and transformers'.

    A rerun computes tokens as parts of a prompt, which vLLM does at temperature 1 over the whole
    vocabulary. Where the run sampled otherwise, it is compared with transformers alone."""
    from megatron_r1.why.policy.policy_writer import write_policy
    from megatron_r1.why.rerun import fresh_engine

    fresh_engine.check_engine(
        step, recomputation.models.num_parameters, recomputation.models.free_bytes
    )
    gaps = EngineGaps(step, recomputation.policies)

    async def fresh_engine_logprobs(scratch: Path) -> list[np.ndarray]:
        folder = scratch / "hf"
        folder.mkdir()
        write_policy(
            step, recomputation.models.num_parameters, folder, recomputation.models.free_bytes
        )
        return await fresh_engine.compute_engine_logprobs(
            step.run_config, folder, gaps.sequences, scratch
        )

    fresh_logprobs = run_in_scratch_folder(fresh_engine_logprobs)
    rollout = step.config.rollout
    has_plain_sampling = rollout.temperature == 1.0 and not rollout.uses_sampling_mask
    transformers_logprobs = (
        recomputation.policies.old_logprobs
        if has_plain_sampling
        else recomputation.policies.plain_logprobs()
    )
    distances = _engine_distances(
        gaps, fresh_logprobs, transformers_logprobs, refined_comparison, has_plain_sampling
    )
    verdict = engine_verdict(distances, gaps.tolerance, refined_comparison.differs)
    subject = f"of the same tokens; mean |Δ|: {distances.text('fresh engine')}"
    if not has_plain_sampling:
        subject += (
            f" (an engine computes given tokens at temperature 1 over the whole vocabulary, the "
            f"run sampled at temperature {rollout.temperature:g}"
            f"{', from a part of it' if rollout.uses_sampling_mask else ''})"
        )
    return rerun_comparison(ENGINE, subject, distances, gaps.tolerance, verdict), verdict


def _engine_distances(
    gaps: EngineGaps,
    fresh_logprobs: Sequence[np.ndarray],
    transformers_logprobs: Sequence[np.ndarray],
    refined_comparison: Comparison,
    has_plain_sampling: bool,
) -> Distances:
    """Return the distances over the tokens of the newest version, of the responses that depart
    where some do.

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
        mean(gaps.gaps_from(fresh_logprobs)) if has_plain_sampling else math.nan,
        mean(fresh_gaps),
    )
    if math.isnan(distances.recorded_to_transformers) or math.isnan(
        distances.rerun_to_transformers
    ):
        raise CannotRecompute(f"no token to compare is of version {gaps.newest_version}")
    return distances


ENGINE = Rerun(
    FAMILY,
    "a fresh engine's log-probabilities",
    engine_logprobs.NAME,
    "starting an engine",
    _compare_fresh_engine,
)


def _compare_single_rank(
    step: RecordedStep, recomputation: Recomputation, refined_comparison: Comparison
) -> tuple[Comparison, RerunVerdict]:
    """Compare the distance of one rank from the engine with that of the run's trainer, and the rank
    with transformers."""
    from megatron_r1.why.rerun import single_rank

    single_rank.check_rank(
        step, recomputation.models.num_parameters, recomputation.models.free_bytes
    )

    async def measure(scratch: Path) -> single_rank.RankDistances:
        return await single_rank.measure_distances(
            step, recomputation.policies.old_logprobs, scratch
        )

    rank_distances = run_in_scratch_folder(measure)
    recorded_distance = finite_metric(step.metrics_row, single_rank.METRIC)
    distances = Distances(
        refined_comparison.distance,
        absolute_distance(
            math.nan if recorded_distance is None else recorded_distance, rank_distances.engine
        ),
        rank_distances.transformers,
    )
    tolerance = ROUNDING_BY_DTYPE[step.run_config.model.dtype]
    layout = single_rank.layout_text(step.run_config.parallel)
    verdict = trainer_verdict(distances, tolerance, refined_comparison.differs, layout)
    subject = (
        "of the same tokens; |Δ|: "
        f"{distances.text('one rank')}; {layout or 'the run had one rank too'}"
    )
    return rerun_comparison(TRAINER, subject, distances, tolerance, verdict), verdict


TRAINER = Rerun(
    reference_weights.POLICIES_STAGE,
    "one rank's log-probabilities",
    trainer_logprobs.TRAINER,
    "starting one trainer rank",
    _compare_single_rank,
)


Notify = Callable[[str], None]
RERUNS = {"engine": ENGINE, "trainer": TRAINER}
"""By the name that --rerun takes."""


def refine_by_reruns(
    report: Report,
    step: RecordedStep,
    recomputation: Recomputation,
    kinds: Sequence[str],
    notify: Notify,
) -> None:
    """Make reruns, and put each behind the comparison that it refines.

    Args:
        report: the comparisons, which are changed.
        step: what the run recorded of it.
        recomputation: its log-probabilities by transformers.
        kinds: keys of `RERUNS`.
        notify: called with a line before something is started."""
    for kind in kinds:
        rerun = RERUNS[kind]
        refined_comparison = report.comparison(rerun.family, rerun.refines)
        if refined_comparison is None or refined_comparison.status == NOT_CHECKED:
            reason = "it was not compared with transformers" + (
                f": {refined_comparison.reason}" if refined_comparison else ""
            )
            report.insert(not_checked(rerun.family, rerun.name, reason), rerun.refines)
            continue
        notify(f"rerun {kind}: {rerun.start} on the weights before step {step.step}")
        try:
            comparison, verdict = rerun.check(step, recomputation, refined_comparison)
        except (CannotRecompute, UserError) as reason:
            report.insert(not_checked(rerun.family, rerun.name, str(reason)), rerun.refines)
            continue
        report.insert(comparison, rerun.refines)
        if refined_comparison.differs:
            report.replace(refined_comparison, _add_rerun_verdict(refined_comparison, verdict))


def _add_rerun_verdict(comparison: Comparison, verdict: RerunVerdict) -> Comparison:
    """Return a departure with what its rerun says; without a cause of its own the remedy is the
    rerun's."""
    before, hint, _ = comparison.remedy.partition(HINT)
    return replace(
        comparison,
        reason=f"{comparison.reason}; {verdict.conclusion}",
        remedy=verdict.remedy if hint else before,
    )
