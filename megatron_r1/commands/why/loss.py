"""Old and reference log-probabilities, and the step's loss with its metrics, recomputed; where they
depart, the updates once more with one thing exchanged at a time, until one explains the metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.commands.compare import ROUNDING
from megatron_r1.commands.why import formulas
from megatron_r1.commands.why.finding import DEPARTS, EQUAL, Finding, not_checked
from megatron_r1.commands.why.recorded import RecordedStep, weights_after
from megatron_r1.config import RLConfig
from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.reporting.wording import number, percent

if TYPE_CHECKING:
    from megatron_r1.commands.why.recompute import Exchange, Recomputation, Replayed

POLICIES, LOSS = "log-probabilities", "loss"
LOSS_ROUNDING = {"float32": 2.0**-19, "bfloat16": 2.0**-7}
"""Largest distance of a loss, over the mean |advantage|: the terms of a loss cancel, so that its
own size says nothing."""
RELATIVE = {
    "float32": {"ratio/max": 2.0**-10},
    "bfloat16": {"kl": 0.25, "entropy": 0.05, "grad_norm": 0.15, "importance": 0.05},
}
"""Largest relative distance of other metrics; of those not named `OTHERS`."""
OTHERS = {"float32": 2.0**-12, "bfloat16": 0.5}
ABSOLUTE = {
    "float32": {"kl": 2.0**-24, "entropy": 2.0**-16, "clip_fraction": 0.002},
    "bfloat16": {"kl": 2e-3, "entropy": 0.01, "clip_fraction": 0.05},
}
"""Largest absolute distance, where that is larger: a small KL is a difference of larger numbers,
and tokens at the edge of a clip fall on either side."""
UPDATE = {"float32": 2.0**-8, "bfloat16": 0.5}
"""Largest distance of the change of the weights, relative to it. Adam divides by the root of the
second moment: rounding of small gradients grows to a part of a step."""
FIRST_UPDATES, FIRST_UPDATE = 10, 2.0**-4
"""Of a step among so many first updates: a moment of few gradients may be rounding alone."""
OF_LOSS = (
    *("clip_low", "clip_high", "dual_clip", "importance_cap", "kl_beta", "kl_estimator"),
    "entropy_coef",
)
OF_ADAM = ("beta1", "beta2", "epsilon", "weight_decay", "clip_grad")
"""Settings whose default is tried, of `rl` and of `optimizer`."""
SOURCE = {"float32": "measured (docs/why.md), with a margin", "bfloat16": "a choice"}
METRICS = ("loss", "kl", "entropy", "clip_fraction", "ratio/max", "importance", "grad_norm")


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


def check_loss(step: RecordedStep, recomputed: Recomputation) -> list[Finding]:
    """Return the findings of the loss and its metrics."""
    base = recomputed.base
    findings = [
        _metric(step, name, base) for name in METRICS if name in base.metrics and name in step.line
    ]
    terms = ", ".join(f"{name} {number(value)}" for name, value in base.terms.items())
    if not findings:
        return [not_checked(LOSS, "loss", "metrics.jsonl has none of its metrics")]
    findings[0] = replace(findings[0], compared=f"{findings[0].compared}; |terms|: {terms}")
    if not any(each.departs for each in findings) and not update_departs(step, base):
        return findings
    if (found := explanation(step, recomputed)) is None:
        return findings
    exchange, made = found
    what = (
        f"{exchange.name} explains it: loss {_shown(made.metrics['loss'])}, recorded "
        f"{_shown(step.line.get('loss'))}, by the settings {_shown(base.metrics['loss'])}"
    )
    size = abs(made.metrics["loss"] - base.metrics["loss"]) / _scale(step)
    what += f"; {percent(size)} of the loss by weight of advantages"
    departing = next((each for each in findings if each.departs), None)
    if departing is None:  # the weights alone
        tolerance = update_limit(step)
        name, compared = "cause of the change of the weights", "updates with one thing exchanged"
        size = base.update or math.nan
        source = SOURCE[step.run_config.model.dtype]
        cause = Finding("optimizer", name, DEPARTS, compared, size, tolerance, source, what)
        return [*findings, replace(cause, remedy=exchange.remedy)]
    named = replace(departing, reason=what, remedy=exchange.remedy)
    return [named if each is departing else each for each in findings]


def _scale(step: RecordedStep) -> float:
    """Return the mean |advantage| of the responses that are trained on, at least 1e-6."""
    known = [abs(a) for group in step.advantages for a in group if not math.isnan(a)]
    return max(1e-6, sum(known) / max(1, len(known)))


def _limit(step: RecordedStep, name: str, metrics: Mapping[str, float]) -> float:
    """Return the largest distance of a metric from its recomputed value, one of `metrics`."""
    dtype, rl = step.run_config.model.dtype, step.config.rl
    if name == "loss":  # of advantages that are all 0, KL and entropy alone
        others = {"kl": abs(rl.kl_beta), "entropy": abs(rl.entropy_coef)}
        rounding = sum(weight * _limit(step, each, metrics) for each, weight in others.items())
        return max(LOSS_ROUNDING[dtype] * _scale(step), rounding)
    relative = RELATIVE[dtype].get(name, OTHERS[dtype]) * abs(metrics[name])
    return max(relative, ABSOLUTE[dtype].get(name, 0.0))


def _metric(step: RecordedStep, name: str, made: Replayed) -> Finding:
    own, logged = made.metrics[name], step.line[name]
    limit = _limit(step, name, made.metrics)
    distance = math.inf if logged is None else abs(float(logged) - own)
    return Finding(
        LOSS,
        name,
        EQUAL if distance <= limit else DEPARTS,
        f"{_shown(logged)} of metrics.jsonl with {_shown(own)} recomputed, over "
        f"{step.config.rl.minibatches} updates",
        distance,
        limit,
        SOURCE[step.run_config.model.dtype],
        f"{name} is {_shown(logged)} in metrics.jsonl, {_shown(own)} recomputed",
        remedy="the loss: rl.algorithm and its settings, or the trainer",
    )


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "no number"


def explains(step: RecordedStep, made: Replayed) -> bool:
    """Return whether updates have the recorded metrics, and the checkpoint after the step."""
    gaps = (
        abs(float(step.line[name]) - value) <= _limit(step, name, made.metrics)
        for name, value in made.metrics.items()
        if isinstance(step.line.get(name), int | float)
    )
    return all(gaps) and not update_departs(step, made)


def update_limit(step: RecordedStep) -> float:
    """Return the largest distance of the change of the weights."""
    is_first = step.updates_after(step.step - 1) < FIRST_UPDATES
    return max(UPDATE[step.run_config.model.dtype], FIRST_UPDATE if is_first else 0.0)


def update_departs(step: RecordedStep, made: Replayed) -> bool:
    """Return whether the change of the weights is beyond its tolerance."""
    return made.update is not None and made.update > update_limit(step)


def explanation(step: RecordedStep, recomputed: Recomputation) -> tuple[Exchange, Replayed] | None:
    """Return the first exchange that explains what was recorded, and the updates with it: of those
    of one setting, which may all be within the tolerance, the nearest to the checkpoint after."""
    offered = list(exchanges(step))
    for at, exchange in enumerate(offered):
        made = recomputed.run(exchange)
        if explains(step, made):
            found = [(exchange, made)]
            for other in offered[at + 1 :]:
                same = other.remedy.split(":")[0] == exchange.remedy.split(":")[0]
                if same and made.update is not None:
                    other_made = recomputed.run(other)
                    if explains(step, other_made):
                        found.append((other, other_made))
            return min(found, key=lambda each: each[1].update or 0.0)
    return None


def _defaults(step: RecordedStep) -> Iterator[Exchange]:
    """Yield settings that have no effect: their default in the place of what the recipe says."""
    from megatron_r1.commands.why.recompute import Exchange

    plain = RLConfig(algorithm=step.config.rl.algorithm), OptimizerConfig()
    for section, own, names, default in (
        ("rl", step.config.rl, OF_LOSS, plain[0]),
        ("optimizer", step.config.optimizer, OF_ADAM, plain[1]),
    ):
        for name in names:
            value = getattr(default, name)
            if value == getattr(own, name):
                continue
            change = ((name, value),)
            yield Exchange(
                f"{section}.{name} at its default, {value},",
                f"{section}.{name}: {getattr(own, name)} has no effect",
                loss=change if section == "rl" else (),
                adam=change if section == "optimizer" else (),
            )


def exchanges(step: RecordedStep) -> Iterator[Exchange]:
    """Yield what is exchanged, one thing at a time, the usual faults first."""
    from megatron_r1.commands.why.recompute import Exchange

    rl = step.config.rl
    if rl.kl_beta:
        yield Exchange(
            "KL with the wrong sign",
            "the loss of rl.algorithm: KL is added to what is minimised",
            loss=(("kl_beta", -rl.kl_beta),),
        )
        yield Exchange("no KL term", "rl.kl_beta", loss=(("kl_beta", 0.0),))
        for estimator in {"k1", "k2", "k3"} - {rl.kl_estimator}:
            yield Exchange(
                f"KL by {estimator}", "rl.kl_estimator", loss=(("kl_estimator", estimator),)
            )
        yield Exchange(
            "the policy itself as reference",
            "rl.reference_refresh, or the reference's weights",
            reference="policy",
        )
        if weights_after(step.folder, step.run_config, 0) is not None and step.step > 1:
            yield Exchange(
                "a reference that was not refreshed", "rl.reference_refresh", reference="begin"
            )
    yield Exchange(
        "a denominator that counts masked tokens (the prompt's)",
        "the loss of rl.algorithm: sums and denominators are over response tokens",
        loss=(("counts_prompts", True),),
    )
    for average in {"sequence", "token", "constant"} - {rl.loss_average}:
        yield Exchange(f"average {average}", "rl.loss_average", loss=(("average", average),))
    for std in {"group", "batch", "none"} - {rl.advantage_std}:
        changed = formulas.advantages(
            step.training_rewards, rl.algorithm, std, rl.advantage_epsilon
        )
        yield Exchange(
            f"advantages divided by the deviation of: {std}", "rl.advantage_std", advantages=changed
        )
    cut = [
        [
            math.nan if graded.truncated else a
            for a, graded in zip(own, group.responses, strict=True)
        ]
        for own, group in zip(step.advantages, step.groups, strict=True)
    ]
    if any(graded.truncated for graded in step.responses.values()):
        yield Exchange(
            "truncated answers left out", "rl.overlong_buffer, or the loss", advantages=cut
        )
    if step.step > 1:
        yield Exchange(
            "Adam without its moments",
            "the optimizer's state: it was lost before this step, at a restart or a load",
            without_moments=True,
        )
    if step.config.rollout.temperature != 1:
        yield Exchange(
            "temperature 1 in the trainer", "rollout.temperature", loss=(("temperature", 1.0),)
        )
    yield Exchange(
        "no clipping of the gradient", "optimizer.clip_grad", adam=(("clip_grad", math.inf),)
    )
    if step.config.optimizer.weight_decay:
        yield Exchange("no weight decay", "optimizer.weight_decay", adam=(("weight_decay", 0.0),))
    yield from _defaults(step)
    rate = step.line.get("learning_rate")
    if isinstance(rate, int | float):
        yield Exchange(
            f"the logged learning rate, {rate:g}",
            "optimizer.learning_rate, warmup and decay",
            adam=(("learning_rates", (float(rate),) * rl.minibatches),),
        )
