"""The reruns of `--rerun`. Each refines a comparison: it says which side a departure is
on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_r1.base.errors import UserError
from megatron_r1.why.checks.engine_rerun import ENGINE
from megatron_r1.why.checks.trainer_rerun import TRAINER
from megatron_r1.why.comparison import (
    NOT_CHECKED,
    CannotRecompute,
    Comparison,
    Report,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.readings import HINT, Reading

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

Notify = Callable[[str], None]
RERUNS = {"engine": ENGINE, "trainer": TRAINER}
"""By the name that --rerun takes."""


def refine(
    report: Report,
    step: RecordedStep,
    recomputation: Recomputation,
    kinds: Sequence[str],
    notify: Notify,
) -> None:
    """Make reruns, and put each behind the comparison that it refines.

    Args:
        report: the comparisons, which are changed.
        step: the step.
        recomputation: its log-probabilities by transformers.
        kinds: keys of `RERUNS`.
        notify: called with a line before something is started."""
    for kind in kinds:
        rerun = RERUNS[kind]
        refined_comparison = report.comparison(rerun.stage, rerun.refines)
        if refined_comparison is None or refined_comparison.status == NOT_CHECKED:
            reason = "it was not compared with transformers" + (
                f": {refined_comparison.reason}" if refined_comparison else ""
            )
            report.insert(not_checked(rerun.stage, rerun.name, reason), rerun.refines)
            continue
        notify(f"rerun {kind}: {rerun.start} on the weights before step {step.step}")
        try:
            comparison, reading = rerun.check(step, recomputation, refined_comparison)
        except (CannotRecompute, UserError) as reason:
            report.insert(not_checked(rerun.stage, rerun.name, str(reason)), rerun.refines)
            continue
        report.insert(comparison, rerun.refines)
        if refined_comparison.differs:
            report.replace(refined_comparison, _with_conclusion(refined_comparison, reading))


def _with_conclusion(comparison: Comparison, reading: Reading) -> Comparison:
    """Return a departure with what its rerun says; without a cause of its own the remedy is the
    rerun's."""
    before, hint, _ = comparison.remedy.partition(HINT)
    return replace(
        comparison,
        reason=f"{comparison.reason}; {reading.conclusion}",
        remedy=reading.remedy if hint else before,
    )
