"""Yields candidate causes in the loss: other averages, clips, masks, ratios, weights and KL
terms."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_r1.config import RLConfig
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after
from megatron_r1.why.update.candidate_cause import CandidateCause, other_values

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


def loss_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield other averages, clips, masks, ratios and weights."""
    rl = step.config.rl
    yield CandidateCause(
        "a denominator that counts masked tokens (the prompt's)",
        "rl.loss_average",
        "the loss of rl.algorithm: sums and denominators are over response tokens",
        loss=(("counts_prompts", True),),
    )
    for average in other_values(("sequence", "token", "constant"), rl.loss_average):
        yield CandidateCause(f"average {average}", "rl.loss_average", loss=(("average", average),))
    yield from _clip_causes(rl)
    for place in ("last", "first"):
        yield CandidateCause(
            f"a loss without the {place} token of each response",
            "the mask of the response",
            f"the mask of the response: it leaves out the {place} token of each",
            loss=(("leaves_out", place),),
        )
    yield from _ratio_causes(rl)
    if rl.entropy_coef:
        yield CandidateCause(
            "entropy with the wrong sign",
            "rl.entropy_coef",
            "the loss of rl.algorithm: the entropy is a bonus, subtracted from what is minimized",
            loss=(("entropy_coef", -rl.entropy_coef),),
        )
    if step.config.rollout.temperature != 1:
        yield CandidateCause(
            "temperature 1 in the trainer", "rollout.temperature", loss=(("temperature", 1.0),)
        )


def _ratio_causes(rl: RLConfig) -> Iterator[CandidateCause]:
    """Yield other ratios of policy and old policy, and other importance weights."""
    yield CandidateCause(
        "old log-probabilities that are the current ones, a ratio of 1,",
        "old log-probabilities",
        "the loss of rl.algorithm: the ratio is over the policy before the step's first update",
        loss=(("is_on_policy", True),),
    )
    yield CandidateCause(
        "old log-probabilities that are the engine's",
        "old log-probabilities",
        "the loss of rl.algorithm: the ratio is over the trainer's own log-probabilities, those of "
        "the engine are for importance weights (rl.importance_cap) alone",
        loss=(("uses_engine_as_old", True),),
    )
    yield from _inverse_causes(
        "a ratio of old policy over policy",
        "the ratio",
        "the loss of rl.algorithm: the ratio is policy over old policy",
        "inverts_ratio",
    )
    is_sequence = rl.ratio_level == "sequence"
    yield CandidateCause(
        f"a ratio of each {'token' if is_sequence else 'response'}",
        "rl.ratio_level",
        loss=(("is_sequence_ratio", not is_sequence),),
    )
    if rl.importance_cap is not None:
        yield CandidateCause(
            "no importance weights", "rl.importance_cap", loss=(("importance_cap", None),)
        )
        yield CandidateCause(
            "importance weights without a cap",
            "rl.importance_cap",
            loss=(("importance_cap", math.inf),),
        )
        yield CandidateCause(
            "importance weights of engine over old policy",
            "rl.importance_cap",
            "rl.importance_cap: the weight is old policy over engine",
            loss=(("inverts_importance", True),),
        )


def _inverse_causes(name: str, setting: str, remedy: str, rule: str) -> Iterator[CandidateCause]:
    """Yield a log-ratio that is negated, with its gradient and without."""
    yield CandidateCause(name, setting, remedy, loss=((rule, True),))
    yield CandidateCause(
        f"{name}, with the gradient of one that is not inverted,",
        setting,
        remedy,
        loss=((rule, True), ("keeps_slope", True)),
    )


def _clip_causes(rl: RLConfig) -> Iterator[CandidateCause]:
    """Yield other clips of the ratio."""
    if rl.clip_low != rl.clip_high:
        yield CandidateCause(
            "rl.clip_low and rl.clip_high exchanged",
            "rl.clip_low, rl.clip_high",
            loss=(("clip_low", rl.clip_high), ("clip_high", rl.clip_low)),
        )
    yield CandidateCause(
        "no clip of the ratio",
        "rl.clip_low, rl.clip_high",
        loss=(("clip_low", math.inf), ("clip_high", math.inf)),
    )
    yield CandidateCause(
        "a clip that takes the larger term, as with the wrong sign of the advantage",
        "rl.clip_low, rl.clip_high",
        "the loss of rl.algorithm: the smaller of the free and the clipped term",
        loss=(("takes_larger", True),),
    )


def kl_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield other KL terms, and other references."""
    rl = step.config.rl
    yield CandidateCause(
        "KL with the wrong sign",
        "rl.kl_beta",
        "the loss of rl.algorithm: KL is added to what is minimized",
        loss=(("kl_beta", -rl.kl_beta),),
    )
    yield CandidateCause("no KL term", "rl.kl_beta", loss=(("kl_beta", 0.0),))
    for estimator in other_values(("k1", "k2", "k3"), rl.kl_estimator):
        yield CandidateCause(
            f"KL by {estimator}", "rl.kl_estimator", loss=(("kl_estimator", estimator),)
        )
    if rl.kl_estimator in ("k3", "unbiased"):  # of k1 it has the wrong sign, of k2 it is the same
        yield from _inverse_causes(
            "KL with its arguments exchanged, of reference from policy",
            "rl.kl_estimator",
            "the loss of rl.algorithm: KL is of the policy from the reference",
            "reverses_kl",
        )
    yield CandidateCause(
        "the policy itself as reference",
        "rl.reference_refresh",
        "rl.reference_refresh, or the reference's weights",
        reference="policy",
    )
    if weights_after(step.folder, step.run_config, 0) is not None and step.step > 1:
        yield CandidateCause(
            "a reference that was not refreshed", "rl.reference_refresh", reference="begin"
        )


def default_causes(step: RecordedStep) -> Iterator[CandidateCause]:
    """Yield settings of the loss without effect: their default in place of the recipe's."""
    rl = step.config.rl
    default = RLConfig(algorithm=step.config.rl.algorithm)
    for name in LOSS_SETTINGS:
        value = getattr(default, name)
        if value != getattr(rl, name):
            yield CandidateCause(
                f"rl.{name} at its default, {value},",
                f"rl.{name}",
                f"rl.{name}: {getattr(rl, name)} has no effect",
                loss=((name, value),),
            )
