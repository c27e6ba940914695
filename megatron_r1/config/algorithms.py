"""The policy-gradient algorithms of `rl.algorithm`: their defaults, and the settings they allow.

The mathematics of each is in `controller/algorithms/`, in the file of its name or in `grpo.py`,
whose docstring gives the source of the values here. An algorithm of the user's own has both in one
module (docs/algorithms.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from r1_grading.base.values import read_scalar

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.user_code import find_value

Option = bool | int | float | str
Baseline = Literal["group", "others", "rollout", "none"]


@dataclass(frozen=True)
class AlgorithmRules:
    """Settings of one algorithm.

    Attributes:
        defaults: `rl` settings of its source, used where recipe and preset leave them out.
        kl_in_reward: `kl_beta` weighs a penalty in every token's reward instead of a term of the
            loss.
        advantage_stds: allowed values of `advantage_std`.
        min_group_size: smallest `group_size`.
        dual_clip: whether `dual_clip` has a meaning.
        critic: it needs a critic's values, and trains the critic.
        teacher: it needs a teacher's log-probabilities.
        options: settings that only it has, by name, with their defaults; a recipe's
            `rl.options`.
        recomputed_baseline: the rewards whose mean `why` subtracts when it makes the updates again
            with `grpo.loss` or cispo's: those of the group, of its other responses or of the
            rollout; "none": nothing is subtracted; None: `why` leaves the updates out. With
            `kl_in_reward` a token's advantage is the sum of the rewards to come."""

    defaults: dict[str, Any] = field(default_factory=dict)
    kl_in_reward: bool = False
    advantage_stds: tuple[str, ...] = ("group", "batch", "none")
    min_group_size: int = 2
    dual_clip: bool = True
    critic: bool = False
    teacher: bool = False
    options: dict[str, Option] = field(default_factory=dict)
    recomputed_baseline: Baseline | None = None

    def read_options(self, settings: Mapping[str, Any]) -> dict[str, Option]:
        """Return `options` with a recipe's values.

        Numbers and truth values are read as everywhere (`r1_grading.base.values.read_scalar`).

        Args:
            settings: a recipe's `rl.options`.

        Raises:
            UserError: an unknown name, or a value of another type than the default's."""
        values = dict(self.options)
        for name, value in settings.items():
            key = f"rl.options.{name}"
            if name not in self.options:
                suggestion = did_you_mean(name, self.options, "{}")
                known_names = ", ".join(self.options) or "none"
                raise UserError(
                    f"{key}: unknown option{suggestion or f'; the algorithm has {known_names}'}",
                    key=key,
                    cause=Cause.UNKNOWN,
                )
            try:
                option = values[name] = read_scalar(value, [type(self.options[name])])
                if isinstance(option, float) and not isfinite(option):
                    raise ValueError(f"must be finite, got {value}")
            except ValueError as error:
                raise UserError(f"{key}: {error}", key=key, cause=Cause.MALFORMED) from None
        return values


PPO_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
DAPO_SAMPLES = {"dynamic_sampling": True, "loss_average": "token", "overlong_buffer": 0.2}
NO_KL = {"kl_beta": 0.0}
PLAIN_SUM = {"advantage_std": "none", "loss_average": "constant"}
ALGORITHMS: dict[str, AlgorithmRules] = {
    # the defaults of RLConfig are R1-Zero's
    "grpo": AlgorithmRules(recomputed_baseline="group"),
    "dapo": AlgorithmRules(
        {"clip_low": 0.2, "clip_high": 0.28} | DAPO_SAMPLES | NO_KL, recomputed_baseline="group"
    ),
    "dr_grpo": AlgorithmRules(PLAIN_SUM | PPO_CLIP | NO_KL, recomputed_baseline="group"),
    "gspo": AlgorithmRules(
        {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "minibatches": 4} | NO_KL,
        recomputed_baseline="group",
    ),
    "cispo": AlgorithmRules(
        {"clip_low": 10.0, "clip_high": 4.0} | DAPO_SAMPLES | NO_KL,
        dual_clip=False,
        recomputed_baseline="group",
    ),
    "reinforce": AlgorithmRules(
        PLAIN_SUM | {"minibatches": 1} | NO_KL,
        advantage_stds=("none", "batch"),
        min_group_size=1,
        recomputed_baseline="rollout",
    ),
    "reinforce_pp": AlgorithmRules(
        {"advantage_std": "batch", "loss_average": "token"} | PPO_CLIP | {"kl_beta": 0.01},
        kl_in_reward=True,
        advantage_stds=("batch",),
        min_group_size=1,
        recomputed_baseline="none",
    ),
    "rloo": AlgorithmRules(
        {"group_size": 4} | PLAIN_SUM | {"minibatches": 1, "kl_beta": 0.03},
        kl_in_reward=True,
        advantage_stds=("none",),
        recomputed_baseline="others",
    ),
    "ppo": AlgorithmRules(
        {"advantage_std": "batch"} | PPO_CLIP | {"gae_lambda": 1.0, "discount": 1.0},
        kl_in_reward=True,
        advantage_stds=("batch", "none"),
        min_group_size=1,
        critic=True,
    ),
    "on_policy_distillation": AlgorithmRules(
        {"advantage_std": "none", "loss_average": "token", "discount": 0.0} | NO_KL,
        advantage_stds=("none",),
        min_group_size=1,
        teacher=True,
    ),
}
ALGORITHM_NAMES = tuple(ALGORITHMS)


def find_rules(name: str) -> AlgorithmRules:
    """Return the rules of the algorithm called `name`, or those at "module:NAME" of a user's own.

    Raises:
        UserError: an unknown name, or a module without them.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        try:
            return find_value(
                name, "AlgorithmRules", lambda value: isinstance(value, AlgorithmRules)
            )
        except UserError as error:
            raise UserError(
                f"rl.algorithm: {name}: {error}", key="rl.algorithm", cause=error.cause
            ) from None
    suggestion = did_you_mean(name.replace("+", "p"), ALGORITHM_NAMES, "{}")
    suggestion = suggestion or f"; use {', '.join(ALGORITHM_NAMES)}, or your own as module:RULES"
    raise UserError(
        f"rl.algorithm: there is no {name!r}{suggestion}", key="rl.algorithm", cause=Cause.UNKNOWN
    )
