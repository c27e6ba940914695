"""Yields candidate causes in the optimizer: other states, rules and settings of Adam."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.candidate_cause import CandidateCause

USUAL_SETTINGS = {
    "beta1": (0.0, 0.8, 0.9, 0.95),
    "beta2": (0.9, 0.95, 0.98, 0.99, 0.999),
    "epsilon": (1e-15, 1e-8, 1e-6, 1e-5),
    "weight_decay": (0.01, 0.1),
    "clip_grad": (1.0,),
}
"""Values of `optimizer`: its defaults, and what is usual elsewhere."""
MAX_SKIPPED = 4
"""The most updates of a step that are tried as left out, one at a time; the last always is."""


def optimizer_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield other states and rules of Adam."""
    settings = step.config.optimizer
    yield from _moment_causes(step)
    yield from _update_causes(step)
    yield CandidateCause(
        "no clipping of the gradient", "optimizer.clip_grad", adam=(("clip_grad", math.inf),)
    )
    if settings.weight_decay:
        yield CandidateCause(
            "no weight decay", "optimizer.weight_decay", adam=(("weight_decay", 0.0),)
        )
        yield CandidateCause(
            "weight decay of norms and biases",
            "optimizer.weight_decay",
            "optimizer.weight_decay: norms and biases do not decay",
            adam=(("decays_all", True),),
        )
        yield CandidateCause(
            "weight decay in the gradient, as in Adam before AdamW,",
            "optimizer.weight_decay",
            adam=(("decays_by_gradient", True),),
        )
    for name, values in USUAL_SETTINGS.items():
        for value in values:
            if not math.isclose(value, getattr(settings, name)):
                is_default = value == getattr(OptimizerConfig(), name)
                yield CandidateCause(
                    f"optimizer.{name} {value:g}",
                    f"optimizer.{name}",
                    f"optimizer.{name}: {getattr(settings, name):g} has no effect"
                    if is_default
                    else "",
                    adam=((name, value),),
                )
    rate = step.metrics_row.get("learning_rate")
    if isinstance(rate, int | float):
        yield CandidateCause(
            f"the logged learning rate, {rate:g}",
            "optimizer.learning_rate",
            "optimizer.learning_rate, warmup_updates and decay",
            adam=(("learning_rates", (float(rate),) * step.config.rl.minibatches),),
        )


def _update_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield gradients that add up, updates that are left out, and other bias corrections."""
    count = step.config.rl.minibatches
    if count > 1:
        yield CandidateCause(
            "the gradient of the update before added to that of each",
            "the gradients of an update",
            "the trainer: gradients are set to zero before each update",
            adam=(("accumulates", True),),
        )
        for index in dict.fromkeys((count - 1, 0, *range(1, min(count - 1, MAX_SKIPPED)))):
            yield CandidateCause(
                f"update {index + 1} of {count} left out",
                "the updates of a step",
                "the trainer: each mini-batch makes one optimizer step (step_taken)",
                adam=(("skipped_updates", (index,)),),
            )
    for name, num_updates in (
        ("Adam without its bias correction", math.inf),
        ("Adam with the bias correction of its first update, a counter that stands still,", 1),
    ):
        yield CandidateCause(
            name,
            "the bias correction of Adam",
            "the optimizer: Adam divides its moments by 1 - beta^t, t the updates that were made",
            adam=(("bias_count", num_updates),),
        )


def _moment_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield states of Adam that are lost."""
    remedy = "the optimizer's state: it was lost before this step, at a restart or a load"
    if step.step > 1:
        yield CandidateCause(
            "Adam without its moments", "the optimizer's state", remedy, loses_moments=True
        )
        yield CandidateCause(
            "Adam without its moments, which are zero when a step begins,",
            "the optimizer's state",
            "the optimizer's state: it is lost between two steps",
            adam=(("moment_reset", "step"),),
        )
    yield CandidateCause(
        "Adam without its moments, which are zero before each update,",
        "the optimizer's state",
        "the optimizer's state: it is lost between two updates",
        adam=(("moment_reset", "update"),),
    )
