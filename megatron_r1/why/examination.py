"""Makes all checks of a recorded step, in the order in which data flows through it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_r1.base.errors import UserError
from megatron_r1.why.checks import (
    engine_logprobs,
    files,
    loss,
    optimizer,
    policies,
    push,
    questions,
    reruns,
    rewards,
    routing,
    sampling,
)
from megatron_r1.why.comparison import CannotRecompute, Comparison, Report, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.suspicions import suspicions

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation


Check = Callable[[RecordedStep], list[Comparison]]
WeightCheck = Callable[[RecordedStep, "Recomputation"], list[Comparison]]
RECORD_CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("files", "questions of the step", questions.check),
    ("files", "files", files.check),
    ("sampling", "settings of the engines", sampling.check_settings),
    ("rewards", "rewards", rewards.check),
    ("schedule", "learning rate", optimizer.check_rates),
    ("checkpoint", "checkpoints", optimizer.check_states),
)
"""Checks that need no model: family, what cannot be checked where one fails, and the check."""
WEIGHT_CHECKS: tuple[tuple[str, str, WeightCheck], ...] = (
    ("sampling", routing.NAME, routing.check_routing),
    ("sampling", "engines' log-probabilities", engine_logprobs.check_logprobs),
    ("log-probabilities", "old policy and reference", policies.check_policies),
    ("loss", "loss", loss.check_loss),
    ("optimizer", "change of the weights", optimizer.check_update),
    ("push", "probes and export", push.check_push),
)
"""Checks that recompute with the model's weights, likewise."""

FEW_FLOPS = 2.0**32
"""Floating-point operations of a pass over a step's tokens, a fraction of a second of one core, up
to which threads wait for each other longer than they compute."""


def examine(
    step: RecordedStep,
    memory: int | None = None,
    kinds: Sequence[str] = (),
    notify: Callable[[str], None] = print,
) -> Report:
    """Make all checks of a step.

    Args:
        step: the step, as `read_step` returns it.
        memory: bytes that models may take; None: what is free.
        kinds: the reruns to make, keys of `reruns.RERUNS`.
        notify: called with a line before a rerun."""
    from megatron_r1.why.update.recomputation import Recomputation

    report, recomputed = Report(step.step), Recomputation(step, memory)
    for family, name, check in RECORD_CHECKS:
        report.add(_comparisons(family, name, partial(check, step)))
    with _threads_for(recomputed):
        for family, name, recompute in WEIGHT_CHECKS:
            recomputed.searches_causes = not report.departs_before("loss")
            report.add(_comparisons(family, name, partial(recompute, step, recomputed)))
        reruns.refine(report, step, recomputed, kinds, notify)
        report.curves = engine_logprobs.departures(recomputed)
    report.suspicions = suspicions(step) if report.first_departure is None else []
    return report


@contextlib.contextmanager
def _threads_for(recomputed: "Recomputation") -> Iterator[None]:
    """Compute in the block with one thread where a step is small.

    Args:
        recomputed: the step's model and rows."""
    import torch

    num_threads, is_small = torch.get_num_threads(), False
    with contextlib.suppress(CannotRecompute, UserError):  # the checks say why not
        is_small = recomputed.pass_flops <= FEW_FLOPS
    try:
        if is_small:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(num_threads)


def _comparisons(family: str, name: str, check: Callable[[], list[Comparison]]) -> list[Comparison]:
    """Return what a check finds, or why it could not be made."""
    try:
        return check()
    except (CannotRecompute, UserError) as reason:
        return [not_checked(family, name, str(reason))]
