"""What may have been computed otherwise than the settings say: each a substitution in a step's
updates, which are then made again."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.commands.why import formulas
from megatron_r1.commands.why.recorded import RecordedStep, weights_after
from megatron_r1.config import RLConfig
from megatron_r1.config.optimizer import OptimizerConfig

OF_LOSS = (
    *("clip_low", "clip_high", "dual_clip", "importance_cap", "kl_beta", "kl_estimator"),
    "entropy_coef",
)
OF_ADAM = ("beta1", "beta2", "epsilon", "weight_decay", "clip_grad")
"""Settings whose default is tried, of `rl` and of `optimizer`."""


@dataclass(frozen=True)
class Substitution:
    """One thing substituted in the updates of a step.

    Attributes:
        name: what is substituted, in words.
        setting: what it is a value of: those of one setting may all explain a departure.
        remedy: the setting or file to change where it explains a departure.
        loss: fields of `LossRules` with other values.
        adam: fields of `AdamRules`, likewise.
        advantages: by response, in place of the step's; None: the step's.
        reference: "" for the checkpoint's, else "policy" (the policy before the step) or "begin"
            (the model that the run began with).
        without_moments: begin with moments of zero."""

    name: str
    setting: str = ""
    remedy: str = ""
    loss: tuple[tuple[str, Any], ...] = ()
    adam: tuple[tuple[str, Any], ...] = ()
    advantages: Sequence[Sequence[float]] | None = None
    reference: str = ""
    without_moments: bool = False

    @property
    def change(self) -> str:
        """What to change where this explains a departure."""
        return self.remedy or self.setting


def substitutions(step: RecordedStep) -> Iterator[Substitution]:
    """Yield what is substituted, one thing at a time, the usual faults first."""
    rl = step.config.rl
    if rl.kl_beta:
        yield from _of_kl(step)
    yield Substitution(
        "a denominator that counts masked tokens (the prompt's)",
        "rl.loss_average",
        "the loss of rl.algorithm: sums and denominators are over response tokens",
        loss=(("counts_prompts", True),),
    )
    for average in _others(("sequence", "token", "constant"), rl.loss_average):
        yield Substitution(f"average {average}", "rl.loss_average", loss=(("average", average),))
    for std in _others(("group", "batch", "none"), rl.advantage_std):
        changed = formulas.advantages(
            step.training_rewards, rl.algorithm, std, rl.advantage_epsilon
        )
        yield Substitution(
            f"advantages divided by the deviation of: {std}", "rl.advantage_std", advantages=changed
        )
    mask_truncated = [
        [
            math.nan if graded.truncated else a
            for a, graded in zip(own, group.responses, strict=True)
        ]
        for own, group in zip(step.advantages, step.groups, strict=True)
    ]
    if any(graded.truncated for graded in step.responses.values()):
        yield Substitution(
            "truncated responses left out",
            "rl.overlong_buffer",
            "rl.overlong_buffer, or the loss",
            advantages=mask_truncated,
        )
    if step.step > 1:
        yield Substitution(
            "Adam without its moments",
            "the optimizer's state",
            "the optimizer's state: it was lost before this step, at a restart or a load",
            without_moments=True,
        )
    if step.config.rollout.temperature != 1:
        yield Substitution(
            "temperature 1 in the trainer", "rollout.temperature", loss=(("temperature", 1.0),)
        )
    yield Substitution(
        "no clipping of the gradient", "optimizer.clip_grad", adam=(("clip_grad", math.inf),)
    )
    if step.config.optimizer.weight_decay:
        yield Substitution(
            "no weight decay", "optimizer.weight_decay", adam=(("weight_decay", 0.0),)
        )
    yield from _defaults(step)
    rate = step.line.get("learning_rate")
    if isinstance(rate, int | float):
        yield Substitution(
            f"the logged learning rate, {rate:g}",
            "optimizer.learning_rate",
            "optimizer.learning_rate, warmup and decay",
            adam=(("learning_rates", (float(rate),) * rl.minibatches),),
        )


def _of_kl(step: RecordedStep) -> Iterator[Substitution]:
    """Yield other KL terms, and other references."""
    rl = step.config.rl
    yield Substitution(
        "KL with the wrong sign",
        "rl.kl_beta",
        "the loss of rl.algorithm: KL is added to what is minimized",
        loss=(("kl_beta", -rl.kl_beta),),
    )
    yield Substitution("no KL term", "rl.kl_beta", loss=(("kl_beta", 0.0),))
    for estimator in _others(("k1", "k2", "k3"), rl.kl_estimator):
        yield Substitution(
            f"KL by {estimator}", "rl.kl_estimator", loss=(("kl_estimator", estimator),)
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


def _defaults(step: RecordedStep) -> Iterator[Substitution]:
    """Yield settings that have no effect: their default in the place of what the recipe says."""
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
            yield Substitution(
                f"{section}.{name} at its default, {value},",
                f"{section}.{name}",
                f"{section}.{name}: {getattr(own, name)} has no effect",
                loss=change if section == "rl" else (),
                adam=change if section == "optimizer" else (),
            )


def _others(values: Sequence[str], own: str) -> list[str]:
    return [value for value in values if value != own]
