"""Policy-gradient estimators: a module each, found by the name a recipe gives (`rl.algorithm`).

A module's docstring is its definition, with its source. It imports neither torch nor Megatron, for
the controller reads it too; losses and the like are named as "module:function" and run on the
trainer. `Algorithm` says what a module may hold; what it leaves out has the default there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megatron_r1.errors import did_you_mean

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig

NAMES = (
    "grpo",
    "dapo",
    "dr_grpo",
    "gspo",
    "cispo",
    "reinforce",
    "reinforce_pp",
    "rloo",
    "ppo",
    "on_policy_distillation",
)


@dataclass(frozen=True)
class Algorithm:
    """What a module of this package says, in the module's own names.

    DEFAULTS: `rl` settings of its source, for what recipe and preset leave out.
    advantages: rewards of a rollout's groups, None where nobody could grade, → a number per output:
    its advantage, 0 where ungraded; before TOKEN_ADVANTAGES its reward or advantage, NaN where
    ungraded.
    LOSS: a `training.losses.Loss`, at "module:function".
    TOKEN_ADVANTAGES: a `training.token_advantages.TokenAdvantages`, which gives every token its own
    advantage once the rollout is scored.
    KL_IN_REWARD: `kl_beta` weighs a penalty of every token's reward, and nothing in the loss.
    ADVANTAGE_STDS: what `advantage_std` may be. MIN_GROUP_SIZE: what `group_size` must at least be.
    DUAL_CLIP: whether `dual_clip` has a meaning.
    CRITIC: needs a critic's values, and trains it. TEACHER: needs a teacher's log-probabilities.
    """

    name: str
    DEFAULTS: dict[str, Any]
    advantages: Callable[[list[list[float | None]], RLConfig], list[list[float]]]
    LOSS: str
    TOKEN_ADVANTAGES: str | None = None
    KL_IN_REWARD: bool = False
    ADVANTAGE_STDS: tuple[str, ...] = ("group", "batch", "none")
    MIN_GROUP_SIZE: int = 2
    DUAL_CLIP: bool = True
    CRITIC: bool = False
    TEACHER: bool = False


def find(name: str) -> Algorithm:
    """The algorithm called `name`. Raises ValueError for a name that is none of NAMES."""
    if name not in NAMES:
        meant = did_you_mean(name.replace("+", "p"), NAMES, "{}")
        meant = meant or f"; use {', '.join(NAMES)}"
        raise ValueError(f"rl.algorithm: there is no {name!r}{meant}")
    module = importlib.import_module(f"{__name__}.{name}")
    names = [field.name for field in fields(Algorithm) if hasattr(module, field.name)]
    return Algorithm(name=name, **{said: getattr(module, said) for said in names})
