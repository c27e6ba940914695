"""Policy-gradient algorithms: one module each, named as in a recipe (`rl.algorithm`), but for those
that are GRPO with other settings (`grpo.VARIANTS`).

A module's docstring is its definition, with its source; `config/algorithms.py` has its defaults and
the rules of its settings, which a user's own module, named "module:RULES", has itself. It defines
`advantages` and `loss`, where they are not GRPO's, and `token_advantages` if each token has its
own; where these are computed from rewards without a baseline, `response_rewards` in place of
`advantages`. The controller imports the modules too, to compute advantages: they import torch and
Megatron inside functions only.

Notation: P prompts, G responses o_i to each, N responses in a mini-batch, |o_i| tokens of response
i, ρ = π_θ / π_old of a token, "clip" = min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A). The loss is -J;
prompt tokens and padding are masked in every sum over t."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import RLConfig
from megatron_r1.config.algorithms import AlgorithmRules, find_rules
from megatron_r1.controller.advantages import nan_where_ungraded
from megatron_r1.controller.algorithms import grpo

MODULE_FUNCTIONS = ("advantages", "response_rewards", "loss", "token_advantages")
Advantages = Callable[[list[list[float | None]], RLConfig], list[list[float]]]


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: the rules of its settings, and what its module defines.

    Attributes:
        name: the value of `rl.algorithm`.
        rules: which settings it takes, and their defaults.
        outcome_advantages: maps the rewards of a rollout's groups, None for an ungraded
            response, to the advantage of each response by its outcome (DeepSeekMath, section
            4.1.2): the module's `advantages`, or its `response_rewards`, an advantage without a
            baseline. All tokens of the response have it, or `token_advantages` begin from it. NaN
            for a response that is not trained on (`nan_where_ungraded`).
        loss: "module:function" of a `trainer.losses.Loss`, called on the trainer ranks.
        token_advantages: "module:function" of a `trainer.rollout_batches.TokenAdvantages`, called
            there once the rollout has log-probabilities; None where all tokens of a response share
            one advantage.
    """

    name: str
    rules: AlgorithmRules
    outcome_advantages: Advantages
    loss: str
    token_advantages: str | None = None


def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm called `name`, or the user's own at "module:RULES".

    Raises:
        UserError: an unknown name, or a module that defines nothing of an algorithm, not what its
            rules are for, or both `advantages` and `response_rewards`.
    """
    rules = find_rules(name)
    module_name, separator, _ = name.partition(":")
    if not separator:
        module_name = f"{__name__}.{'grpo' if name in grpo.VARIANTS else name}"
    module = importlib.import_module(module_name)
    own_parts = {
        part: f"{module_name}:{part}" for part in MODULE_FUNCTIONS if hasattr(module, part)
    }
    if not own_parts:
        raise UserError(
            f"rl.algorithm: {name}: {module.__file__} defines none of "
            f"{', '.join(MODULE_FUNCTIONS)}; define one, or use grpo and put the settings "
            "in the recipe",
            key="rl.algorithm",
            cause=Cause.EMPTY,
        )
    if {"advantages", "response_rewards"} <= own_parts.keys():
        raise UserError(
            f"rl.algorithm: {name}: {module.__file__} defines both advantages and "
            "response_rewards, and one of them alone can be used; define response_rewards where "
            "token_advantages starts from the rewards, or else advantages, and remove the other",
            key="rl.algorithm",
            cause=Cause.CONFLICT,
        )
    per_token = rules.critic or rules.teacher or rules.kl_in_reward
    if per_token and "token_advantages" not in own_parts:
        raise UserError(
            f"rl.algorithm: {name}: {module.__file__} defines no token_advantages, which critic, "
            "teacher and kl_in_reward of its rules are for; define it, or leave them out",
            key="rl.algorithm",
            cause=Cause.MISSING,
        )
    advantages = getattr(module, "response_rewards", grpo.advantages)
    advantages = getattr(module, "advantages", advantages)
    return Algorithm(
        name,
        rules,
        advantages if rules.teacher else partial(nan_where_ungraded, name, advantages),
        own_parts.get("loss", f"{grpo.__name__}:loss"),
        own_parts.get("token_advantages"),
    )
