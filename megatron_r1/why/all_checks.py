"""Makes all checks of a recorded step, in the order in which data flows through it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_r1.base.errors import UserError
from megatron_r1.why.checks import (
    checkpoints,
    engine_logprobs,
    files,
    loss,
    optimizer,
    push,
    questions,
    reruns,
    rewards,
    routing,
    sampling,
    schedule,
    trainer_logprobs,
)
from megatron_r1.why.comparison import CannotRecompute, Comparison, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.step_report import Report
from megatron_r1.why.suspicions import find_suspicions

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation


Check = Callable[[RecordedStep], list[Comparison]]
WeightCheck = Callable[[RecordedStep, "Recomputation"], list[Comparison]]
RECORD_CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("files", "questions of the step", questions.compare_questions),
    ("files", "files", files.compare_files),
    ("sampling", "settings of the engines", sampling.compare_sampling),
    ("rewards", "rewards", rewards.compare_recorded_rewards),
    ("schedule", "learning rate", schedule.compare_schedule),
    ("checkpoint", "checkpoints", checkpoints.compare_states),
)
"""Checks that need no model: family, what cannot be checked where one fails, and the check."""
WEIGHT_CHECKS: tuple[tuple[str, str, WeightCheck], ...] = (
    ("sampling", routing.NAME, routing.compare_routing),
    ("sampling", "engines' log-probabilities", engine_logprobs.compare_logprobs),
    ("log-probabilities", "old policy and reference", trainer_logprobs.compare_policies),
    ("loss", "loss", loss.compare_loss),
    ("optimizer", "change of the weights", optimizer.compare_update),
    ("push", "probes and export", push.compare_push),
)
"""Checks that recompute with the model's weights, likewise."""


def examine_step(
    step: RecordedStep,
    memory: int | None = None,
    kinds: Sequence[str] = (),
    notify: Callable[[str], None] = print,
    show_progress: Callable[[str], None] | None = None,
) -> Report:
    """Make all checks of a step.

    Args:
        step: the step, as `read_step` returns it.
        memory: bytes that models may take; None: what is free.
        kinds: the reruns to make, keys of `reruns.RERUNS`.
        notify: called with a line before a rerun.
        show_progress: called with a line for each departure as soon as it is known, and before a
            search for its cause; None: nothing is shown."""
    from megatron_r1.why.policy.step_models import threads_for
    from megatron_r1.why.update.recomputation import Recomputation, ignore_line

    recomputation = Recomputation(step, memory, show_progress or ignore_line)
    report = Report(step.step)

    def add(comparisons: list[Comparison]) -> None:
        report.add(comparisons)
        recomputation.show_departures(comparisons)

    for family, name, check in RECORD_CHECKS:
        add(_run_check(family, name, partial(check, step)))
    with threads_for(recomputation.models):
        for family, name, recompute in WEIGHT_CHECKS:
            recomputation.searches_causes = not report.departs_before("loss")
            add(_run_check(family, name, partial(recompute, step, recomputation)))
        reruns.refine_by_reruns(report, step, recomputation, kinds, notify)
        report.curves = engine_logprobs.departure_curves(recomputation)
    report.suspicions = find_suspicions(step) if report.first_departure is None else []
    return report


def _run_check(family: str, name: str, check: Callable[[], list[Comparison]]) -> list[Comparison]:
    """Return what a check finds, or why it could not be made."""
    try:
        return check()
    except (CannotRecompute, UserError) as reason:
        return [not_checked(family, name, str(reason))]
