"""Policy-gradient estimators: a module each, found by the name a recipe gives (`rl.algorithm`).

A module's docstring is its definition, with its source. The controller imports it too, so it
imports neither torch nor Megatron at module level; losses and token advantages are named as
"module:function" and run on the trainer. Defaults and rules of the settings are in
`config/algorithms.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_r1.config import RLConfig
from megatron_r1.config.algorithms import AlgorithmRules, rules_of


@dataclass(frozen=True)
class Algorithm:
    """An estimator: its rules, and what its module defines.

    advantages: rewards of a rollout's groups, None for an ungraded response, → a number per
    response: its advantage, 0 where ungraded; with `token_advantages` its reward or advantage, NaN
    where ungraded.
    loss: "module:function" of a `training.losses.Loss`.
    token_advantages: "module:function" of a `training.token_advantages.TokenAdvantages`, which
    gives every token its own advantage once the rollout is scored; None: all tokens of a response
    share one.
    """

    name: str
    rules: AlgorithmRules
    advantages: Callable[[list[list[float | None]], RLConfig], list[list[float]]]
    loss: str
    token_advantages: str | None = None


def find(name: str) -> Algorithm:
    """Return the algorithm called `name`. Raises ValueError for an unknown name."""
    rules = rules_of(name)
    module = importlib.import_module(f"{__name__}.{name}")
    token_advantages = getattr(module, "TOKEN_ADVANTAGES", None)
    return Algorithm(name, rules, module.advantages, module.LOSS, token_advantages)
