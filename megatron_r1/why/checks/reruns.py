"""The reruns of `--rerun`: a fresh engine's log-probabilities, and those of one trainer rank. Each
refines a comparison: it says which side a departure is on."""

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
from megatron_r1.reporting.formatting import finite_metric as finite
from megatron_r1.why.checks import engine_logprobs, policies
from megatron_r1.why.checks.engine_gaps import EngineGaps, mean_gap
from megatron_r1.why.checks.sampling import FAMILY
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    NOT_CHECKED,
    ROUNDING_BY_DTYPE,
    CannotRecompute,
    Comparison,
    Report,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.readings import (
    HINT,
    Distances,
    Reading,
    distance,
    engine_reading,
    trainer_reading,
)

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

T = TypeVar("T")
Notify = Callable[[str], None]


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
    check: Callable[[RecordedStep, Recomputation, Comparison], tuple[Comparison, Reading]]


def refine(
    report: Report,
    step: RecordedStep,
    recomputed: Recomputation,
    kinds: Sequence[str],
    notify: Notify,
) -> None:
    """Make reruns, and put each behind the comparison that it refines.

    Args:
        report: the comparisons, which are changed.
        step: the step.
        recomputed: its log-probabilities by transformers.
        kinds: keys of `RERUNS`.
        notify: called with a line before something is started."""
    for kind in kinds:
        rerun = RERUNS[kind]
        refined = report.comparison(rerun.family, rerun.refines)
        if refined is None or refined.status == NOT_CHECKED:
            reason = "it was not compared with transformers" + (
                f": {refined.reason}" if refined else ""
            )
            report.insert(not_checked(rerun.family, rerun.name, reason), rerun.refines)
            continue
        notify(f"rerun {kind}: {rerun.start} on the weights before step {step.step}")
        try:
            comparison, reading = rerun.check(step, recomputed, refined)
        except (CannotRecompute, UserError) as reason:
            report.insert(not_checked(rerun.family, rerun.name, str(reason)), rerun.refines)
            continue
        report.insert(comparison, rerun.refines)
        if refined.departs:
            report.replace(refined, _concluded(refined, reading))


def _concluded(refined: Comparison, reading: Reading) -> Comparison:
    """Return a departure with what its rerun says; without a cause of its own the remedy is the
    rerun's."""
    before, hint, _ = refined.remedy.partition(HINT)
    return replace(
        refined,
        reason=f"{refined.reason}; {reading.conclusion}",
        remedy=reading.remedy if hint else before,
    )


def _check_engine(
    step: RecordedStep, recomputed: Recomputation, refined: Comparison
) -> tuple[Comparison, Reading]:
    """Compare a fresh engine's log-probabilities with the logged ones and transformers'.

    A rerun scores tokens as parts of a prompt, which vLLM does at temperature 1 over the whole
    vocabulary. Where the run sampled otherwise, it is compared with transformers alone."""
    from megatron_r1.why.policy.policy_export import write_policy
    from megatron_r1.why.rerun import fresh_engine

    fresh_engine.check_engine(
        step, recomputed.policies.num_parameters, recomputed.policies.free_bytes
    )
    gaps = EngineGaps(step, recomputed.policies)

    async def score(scratch: Path) -> list[np.ndarray]:
        folder = scratch / "hf"
        folder.mkdir()
        write_policy(
            step, recomputed.policies.num_parameters, folder, recomputed.policies.free_bytes
        )
        return await fresh_engine.score(step.run_config, folder, gaps.sequences, scratch)

    rerun = _run_in_scratch_folder(score)
    rollout = step.config.rollout
    is_scored_alike = rollout.temperature == 1.0 and not rollout.truncates_sampling
    old = recomputed.policies.old if is_scored_alike else recomputed.policies.plain_logprobs()
    distances = _engine_distances(gaps, rerun, old, refined, is_scored_alike)
    reading = engine_reading(distances, gaps.tolerance, refined.departs)
    compared = f"of the same tokens; mean |Δ|: {distances.text('fresh engine')}"
    if not is_scored_alike:
        compared += (
            f" (an engine scores given tokens at temperature 1 from the whole vocabulary, the run "
            f"sampled at temperature {rollout.temperature:g}"
            f"{', from a part of it' if rollout.truncates_sampling else ''})"
        )
    return _comparison(ENGINE, compared, distances, gaps.tolerance, reading), reading


def _engine_distances(
    gaps: EngineGaps,
    rerun: Sequence[np.ndarray],
    transformers_logprobs: Sequence[np.ndarray],
    refined: Comparison,
    is_scored_alike: bool,
) -> Distances:
    """Return the distances over the tokens of the newest version, of the responses that depart
    where some do.

    Args:
        gaps: the logged log-probabilities' differences from transformers'.
        rerun: the fresh engine's log-probabilities.
        transformers_logprobs: transformers', at temperature 1 over the whole vocabulary.
        refined: the comparison of the logged ones.
        is_scored_alike: whether the run sampled at temperature 1 from the whole vocabulary.

    Raises:
        CannotRecompute: no token is of the version before the step."""
    concerned = set(refined.concerned) if refined.departs else set()

    def mean(differences: Sequence[np.ndarray]) -> float:
        return mean_gap(
            [
                difference
                for difference, sequence in zip(differences, gaps.sequences, strict=True)
                if not concerned or sequence.response in concerned
            ]
        )

    logged = gaps.gaps_from(gaps.recomputed.old)
    fresh = [
        np.where(np.isnan(gap), np.nan, rerun_logprobs - plain_logprobs)
        for gap, rerun_logprobs, plain_logprobs in zip(
            logged, rerun, transformers_logprobs, strict=True
        )
    ]
    distances = Distances(
        mean(logged), mean(gaps.gaps_from(rerun)) if is_scored_alike else math.nan, mean(fresh)
    )
    if math.isnan(distances.recorded) or math.isnan(distances.rerun):
        raise CannotRecompute(f"no token to compare is of version {gaps.newest}")
    return distances


def _check_trainer(
    step: RecordedStep, recomputed: Recomputation, refined: Comparison
) -> tuple[Comparison, Reading]:
    """Compare the distance of one rank from the engine with that of the run's trainer, and the rank
    with transformers."""
    from megatron_r1.why.rerun import single_rank

    single_rank.check_rank(step, recomputed.policies.num_parameters, recomputed.policies.free_bytes)

    async def measure(scratch: Path) -> single_rank.RankDistances:
        return await single_rank.measure(step, recomputed.policies.old, scratch)

    measured = _run_in_scratch_folder(measure)
    recorded = finite(step.line, single_rank.METRIC)
    distances = Distances(
        refined.distance,
        distance(math.nan if recorded is None else recorded, measured.engine),
        measured.transformers,
    )
    tolerance = ROUNDING_BY_DTYPE[step.run_config.model.dtype]
    layout = single_rank.layout_text(step.run_config.parallel)
    reading = trainer_reading(distances, tolerance, refined.departs, layout)
    compared = (
        "of the same tokens; |Δ|: "
        f"{distances.text('one rank')}; {layout or 'the run had one rank too'}"
    )
    return _comparison(TRAINER, compared, distances, tolerance, reading), reading


def _comparison(
    rerun: Rerun, compared: str, distances: Distances, tolerance: float, reading: Reading
) -> Comparison:
    text = f"{compared}; {reading.conclusion}"
    return Comparison(
        rerun.family,
        rerun.name,
        DEPARTS if reading.departs else EQUAL,
        text,
        distances.rerun,
        tolerance,
        "rounding of the dtype (docs/compare.md)",
        text if reading.departs else "",
        remedy=reading.remedy if reading.departs else "",
    )


def _run_in_scratch_folder(work: Callable[[Path], Coroutine[Any, Any, T]]) -> T:
    """Run what starts processes, in a temporary folder that is removed; SIGTERM and Ctrl-C end it
    after it has stopped them.

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


ENGINE = Rerun(
    FAMILY,
    "a fresh engine's log-probabilities",
    engine_logprobs.NAME,
    "starting an engine",
    _check_engine,
)
TRAINER = Rerun(
    policies.POLICIES_FAMILY,
    "one rank's log-probabilities",
    policies.TRAINER,
    "starting one trainer rank",
    _check_trainer,
)
RERUNS = {"engine": ENGINE, "trainer": TRAINER}
"""By the name that --rerun takes."""
