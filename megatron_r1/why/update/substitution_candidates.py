"""What may have been computed otherwise than the settings say: each a substitution in a step's
updates, which are then recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_r1.config import RLConfig
from megatron_r1.config.optimizer import OptimizerConfig
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after
from megatron_r1.why.update.advantage_substitutions import advantage_substitutions
from megatron_r1.why.update.step_substitution import Substitution, other_values

if TYPE_CHECKING:
    from megatron_r1.why.update.checkpoint_after import CheckpointTraces
    from megatron_r1.why.update.recomputation import Recomputation

FACTOR_TOLERANCE = 0.01
"""Relative distance of a factor from 1 below which it is 1."""
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
LOSS_SETTINGS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "importance_cap",
    "kl_beta",
    "kl_estimator",
    "entropy_coef",
)
"""Settings of `rl` whose default is tried."""


def candidate_substitutions(
    step: RecordedStep, recomputation: Recomputation
) -> Iterator[Substitution]:
    """Yield what is substituted, one thing at a time.

    Args:
        step: what the run recorded of it.
        recomputation: its updates as the settings say."""
    rl = step.config.rl
    if rl.kl_beta and not step.rules.kl_in_reward:
        yield from _kl_substitutions(step)
    yield from _loss_substitutions(step)
    yield from advantage_substitutions(step, recomputation.traces)
    yield from _sample_substitutions(step, recomputation)
    yield from _optimizer_substitutions(step)
    yield from _trace_substitutions(step, recomputation.traces)
    yield from _default_substitutions(step)


def _loss_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield other averages, clips, masks, ratios and weights."""
    rl = step.config.rl
    yield Substitution(
        "a denominator that counts masked tokens (the prompt's)",
        "rl.loss_average",
        "the loss of rl.algorithm: sums and denominators are over response tokens",
        loss=(("counts_prompts", True),),
    )
    for average in other_values(("sequence", "token", "constant"), rl.loss_average):
        yield Substitution(f"average {average}", "rl.loss_average", loss=(("average", average),))
    yield from _clip_substitutions(rl)
    for place in ("last", "first"):
        yield Substitution(
            f"a loss without the {place} token of each response",
            "the mask of the response",
            f"the mask of the response: it leaves out the {place} token of each",
            loss=(("leaves_out", place),),
        )
    yield from _ratio_substitutions(rl)
    if rl.entropy_coef:
        yield Substitution(
            "entropy with the wrong sign",
            "rl.entropy_coef",
            "the loss of rl.algorithm: the entropy is a bonus, subtracted from what is minimized",
            loss=(("entropy_coef", -rl.entropy_coef),),
        )
    if step.config.rollout.temperature != 1:
        yield Substitution(
            "temperature 1 in the trainer", "rollout.temperature", loss=(("temperature", 1.0),)
        )


def _ratio_substitutions(rl: RLConfig) -> Iterator[Substitution]:
    """Yield other ratios of policy and old policy, and other importance weights."""
    yield Substitution(
        "old log-probabilities that are the current ones, a ratio of 1,",
        "old log-probabilities",
        "the loss of rl.algorithm: the ratio is over the policy before the step's first update",
        loss=(("is_on_policy", True),),
    )
    yield Substitution(
        "old log-probabilities that are the engine's",
        "old log-probabilities",
        "the loss of rl.algorithm: the ratio is over the trainer's own log-probabilities, those of "
        "the engine are for importance weights (rl.importance_cap) alone",
        loss=(("uses_engine_as_old", True),),
    )
    yield from _inverse_substitutions(
        "a ratio of old policy over policy",
        "the ratio",
        "the loss of rl.algorithm: the ratio is policy over old policy",
        "inverts_ratio",
    )
    is_sequence = rl.ratio_level == "sequence"
    yield Substitution(
        f"a ratio of each {'token' if is_sequence else 'response'}",
        "rl.ratio_level",
        loss=(("is_sequence_ratio", not is_sequence),),
    )
    if rl.importance_cap is not None:
        yield Substitution(
            "no importance weights", "rl.importance_cap", loss=(("importance_cap", None),)
        )
        yield Substitution(
            "importance weights without a cap",
            "rl.importance_cap",
            loss=(("importance_cap", math.inf),),
        )
        yield Substitution(
            "importance weights of engine over old policy",
            "rl.importance_cap",
            "rl.importance_cap: the weight is old policy over engine",
            loss=(("inverts_importance", True),),
        )


def _inverse_substitutions(
    name: str, setting: str, remedy: str, rule: str
) -> Iterator[Substitution]:
    """Yield a log-ratio that is negated, with its gradient and without.

    Args:
        name: as of `Substitution`, like the next two.
        setting: what it is a value of.
        remedy: what to change.
        rule: the field of `LossRules`."""
    yield Substitution(name, setting, remedy, loss=((rule, True),))
    yield Substitution(
        f"{name}, with the gradient of one that is not inverted,",
        setting,
        remedy,
        loss=((rule, True), ("keeps_slope", True)),
    )


def _clip_substitutions(rl: RLConfig) -> Iterator[Substitution]:
    """Yield other clips of the ratio."""
    if rl.clip_low != rl.clip_high:
        yield Substitution(
            "rl.clip_low and rl.clip_high exchanged",
            "rl.clip_low, rl.clip_high",
            loss=(("clip_low", rl.clip_high), ("clip_high", rl.clip_low)),
        )
    yield Substitution(
        "no clip of the ratio",
        "rl.clip_low, rl.clip_high",
        loss=(("clip_low", math.inf), ("clip_high", math.inf)),
    )
    yield Substitution(
        "a clip that takes the larger term, as with the wrong sign of the advantage",
        "rl.clip_low, rl.clip_high",
        "the loss of rl.algorithm: the smaller of the free and the clipped term",
        loss=(("takes_larger", True),),
    )


def _sample_substitutions(
    step: RecordedStep, recomputation: Recomputation
) -> Iterator[Substitution]:
    """Yield samples that are lost, used twice, or used in part."""
    yield Substitution(
        "prompt tokens in the loss",
        "the mask of the response",
        "the mask of rl.algorithm's loss: prompts are not trained on",
        trains_prompts=True,
    )
    if step.config.rl.routing_replay:
        yield Substitution(
            "experts that the trainer chooses",
            "rl.routing_replay",
            "rl.routing_replay: the engine's experts are not replayed",
            routes_itself=True,
        )
    if step.config.rl.minibatches > 1:
        yield Substitution(
            "every update on the first mini-batch",
            "rl.minibatches",
            "rl.minibatches: an update trains on its own mini-batch",
            repeats_first=True,
        )
    counts = [len(update[0]) for update in recomputation.inputs.packed_rows]
    if any(count > 1 for count in counts):
        yield Substitution(
            "gradients averaged over the micro-batches of an update",
            "parallel.tokens_per_microbatch",
            "the trainer: gradients are summed over micro-batches, and divided by the loss's "
            "denominator alone",
            adam=(("gradient_factors", tuple(1 / count for count in counts)),),
        )
    for name, rows in recomputation.inputs.shares():
        yield Substitution(
            f"the gradient of {name} lost",
            "parallel",
            f"parallel: the sum of the gradients leaves out {name}",
            rows_without_gradient=rows,
        )
    if step.hf_config.get("tie_word_embeddings") and step.run_config.model.lora is None:
        yield Substitution(
            "a tied head whose gradient the embedding lacks",
            "tie_word_embeddings",
            "parallel.pipeline: first and last stage hold copies of the tied head, whose gradients "
            "are summed",
            unties_head=True,
        )


def _optimizer_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield other states and rules of Adam."""
    settings = step.config.optimizer
    yield from _moment_substitutions(step)
    yield from _update_substitutions(step)
    yield Substitution(
        "no clipping of the gradient", "optimizer.clip_grad", adam=(("clip_grad", math.inf),)
    )
    if settings.weight_decay:
        yield Substitution(
            "no weight decay", "optimizer.weight_decay", adam=(("weight_decay", 0.0),)
        )
        yield Substitution(
            "weight decay of norms and biases",
            "optimizer.weight_decay",
            "optimizer.weight_decay: norms and biases do not decay",
            adam=(("decays_all", True),),
        )
        yield Substitution(
            "weight decay in the gradient, as in Adam before AdamW,",
            "optimizer.weight_decay",
            adam=(("decays_by_gradient", True),),
        )
    for name, values in USUAL_SETTINGS.items():
        for value in values:
            if not math.isclose(value, getattr(settings, name)):
                is_default = value == getattr(OptimizerConfig(), name)
                yield Substitution(
                    f"optimizer.{name} {value:g}",
                    f"optimizer.{name}",
                    f"optimizer.{name}: {getattr(settings, name):g} has no effect"
                    if is_default
                    else "",
                    adam=((name, value),),
                )
    rate = step.metrics_row.get("learning_rate")
    if isinstance(rate, int | float):
        yield Substitution(
            f"the logged learning rate, {rate:g}",
            "optimizer.learning_rate",
            "optimizer.learning_rate, warmup_updates and decay",
            adam=(("learning_rates", (float(rate),) * step.config.rl.minibatches),),
        )


def _update_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield gradients that add up, updates that are left out, and other bias corrections."""
    count = step.config.rl.minibatches
    if count > 1:
        yield Substitution(
            "the gradient of the update before added to that of each",
            "the gradients of an update",
            "the trainer: gradients are set to zero before each update",
            adam=(("accumulates", True),),
        )
        for index in dict.fromkeys((count - 1, 0, *range(1, min(count - 1, MAX_SKIPPED)))):
            yield Substitution(
                f"update {index + 1} of {count} left out",
                "the updates of a step",
                "the trainer: each mini-batch makes one optimizer step (step_taken)",
                adam=(("skipped_updates", (index,)),),
            )
    for name, num_updates in (
        ("Adam without its bias correction", math.inf),
        ("Adam with the bias correction of its first update, a counter that stands still,", 1),
    ):
        yield Substitution(
            name,
            "the bias correction of Adam",
            "the optimizer: Adam divides its moments by 1 - beta^t, t the updates that were made",
            adam=(("bias_count", num_updates),),
        )


def _moment_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield states of Adam that are lost."""
    remedy = "the optimizer's state: it was lost before this step, at a restart or a load"
    if step.step > 1:
        yield Substitution(
            "Adam without its moments", "the optimizer's state", remedy, loses_moments=True
        )
        yield Substitution(
            "Adam without its moments, which are zero when a step begins,",
            "the optimizer's state",
            "the optimizer's state: it is lost between two steps",
            adam=(("moment_reset", "step"),),
        )
    yield Substitution(
        "Adam without its moments, which are zero before each update,",
        "the optimizer's state",
        "the optimizer's state: it is lost between two updates",
        adam=(("moment_reset", "update"),),
    )


def _trace_substitutions(step: RecordedStep, traces: CheckpointTraces) -> Iterator[Substitution]:
    """Yield multiples of learning rate and gradient that a checkpoint shows, and tensors
    without one."""
    if traces.parameters_without_gradient:
        names = ", ".join(traces.parameters_without_gradient[:3])
        yield Substitution(
            f"no gradient for {len(traces.parameters_without_gradient):,} tensors, as {names},",
            "frozen tensors",
            f"the trainer: {names} get no gradient",
            adam=(("without_gradient", traces.parameters_without_gradient),),
        )
    yield from _weight_substitutions(step, traces)
    if traces.update_factor is not None and abs(traces.update_factor - 1) > FACTOR_TOLERANCE:
        rates = tuple(rate * traces.update_factor for rate in step.learning_rates)
        yield Substitution(
            f"{traces.update_factor:.3g} times the learning rate",
            "optimizer.learning_rate",
            "optimizer.learning_rate: the optimizer computes with another than the schedule's",
            adam=(("learning_rates", rates),),
        )
    multiples = [traces.gradient_factor]
    norm, recomputed_norm = step.metrics_row.get("grad_norm"), traces.norm
    if isinstance(norm, int | float) and recomputed_norm:
        multiples.append(norm / recomputed_norm)
    for factor in multiples:
        if factor is None or abs(factor - 1) <= FACTOR_TOLERANCE or factor <= 0:
            continue
        yield Substitution(
            f"{factor:.4g} times the gradient{_describe_factor(step, factor)}",
            "parallel",
            "the trainer: gradients are summed over micro-batches and ranks, and divided by the "
            "loss's denominator alone",
            adam=(("gradient_factors", (factor,) * step.config.rl.minibatches),),
        )
        yield clip_substitution(factor * step.config.optimizer.clip_grad)


def clip_substitution(clip: float) -> Substitution:
    """Return gradients that are clipped to another norm.

    Args:
        clip: the norm."""
    return Substitution(
        f"a gradient clipped to a norm of {clip:.4g}",
        "optimizer.clip_grad",
        adam=(("clip_grad", clip),),
    )


def _weight_substitutions(step: RecordedStep, traces: CheckpointTraces) -> Iterator[Substitution]:
    """Yield the weights of KL and entropy that the logged loss would have."""
    logged, recomputed_loss = step.metrics_row.get("loss"), sum(traces.terms.values())
    if not isinstance(logged, int | float):
        return
    for key, name in (("kl_beta", "kl"), ("entropy_coef", "entropy")):
        value, term = getattr(step.config.rl, key), traces.terms.get(name)
        if not value or not term:
            continue
        # Of the same weights after each update.
        nearest = value * (1 + (logged - recomputed_loss) / term)
        for rounded in dict.fromkeys(float(f"{nearest:.{digits}g}") for digits in (1, 2)):
            if abs(rounded) > 1e-3 * abs(value) and not math.isclose(rounded, value):
                yield Substitution(f"rl.{key} {rounded:g}", f"rl.{key}", loss=((key, rounded),))


def _describe_factor(step: RecordedStep, factor: float) -> str:
    """Return what a factor of the gradient is equal to, as text."""
    parallel, count = step.run_config.parallel, step.metrics_row.get("packing/microbatches", 1)
    ranks = parallel.data_parallel_size(parallel.processes)
    for number, noun in ((ranks, "data-parallel ranks"), (count, "micro-batches of an update")):
        for value, words in ((number, "the number"), (1 / number, "1 over the number")):
            if number > 1 and math.isclose(factor, value, rel_tol=FACTOR_TOLERANCE):
                return f", {words} of {noun},"
    return ""


def _kl_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield other KL terms, and other references."""
    rl = step.config.rl
    yield Substitution(
        "KL with the wrong sign",
        "rl.kl_beta",
        "the loss of rl.algorithm: KL is added to what is minimized",
        loss=(("kl_beta", -rl.kl_beta),),
    )
    yield Substitution("no KL term", "rl.kl_beta", loss=(("kl_beta", 0.0),))
    for estimator in other_values(("k1", "k2", "k3"), rl.kl_estimator):
        yield Substitution(
            f"KL by {estimator}", "rl.kl_estimator", loss=(("kl_estimator", estimator),)
        )
    if rl.kl_estimator in ("k3", "unbiased"):  # of k1 it has the wrong sign, of k2 it is the same
        yield from _inverse_substitutions(
            "KL with its arguments exchanged, of reference from policy",
            "rl.kl_estimator",
            "the loss of rl.algorithm: KL is of the policy from the reference",
            "reverses_kl",
        )
    yield Substitution(
        "the policy itself as reference",
        "rl.reference_refresh",
        "rl.reference_refresh, or the reference's weights",
        reference="policy",
    )
    if weights_after(step.folder, step.run_config, 0) is not None and step.step > 1:
        yield Substitution(
            "a reference that was not refreshed", "rl.reference_refresh", reference="begin"
        )


def _default_substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield settings of the loss without effect: their default in place of the recipe's."""
    rl = step.config.rl
    default = RLConfig(algorithm=step.config.rl.algorithm)
    for name in LOSS_SETTINGS:
        value = getattr(default, name)
        if value != getattr(rl, name):
            yield Substitution(
                f"rl.{name} at its default, {value},",
                f"rl.{name}",
                f"rl.{name}: {getattr(rl, name)} has no effect",
                loss=((name, value),),
            )
