"""The options of a recipe's rewards, and the arguments with which a reward is called."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from r1_grading.base.errors import Cause, UserError, did_you_mean
from r1_grading.base.user_code import find_function
from r1_grading.base.values import read_scalar
from r1_grading.rewards import (
    GRADERS,
    RESPONSE_ONLY_REWARDS,
    SERVED_REWARDS,
    resolve_reward,
)

Options = Mapping[str, Mapping[str, Any]]
"""`rewards.options`."""
RUN_ARGUMENTS = ("num_tokens", "thought_opened", "question")
"""Arguments that a run gives for each sample; neither an option nor a prompt's field overrides
them."""


def read_options(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check a recipe's `rewards.options`, reward → {name: value}, and return it.

    Options of a user's own reward are not checked: its module runs in worker processes only.

    Raises:
        UserError: an unknown reward, a value that is not a mapping, or an option that a registered
            reward does not have; it names the reward and the key.
    """
    for kind, values in options.items():
        path = f"rewards.options.{kind}"
        try:
            resolve_reward(kind)
        except UserError as error:
            raise UserError(f"{path}: {error}", key=path, cause=error.cause) from None
        if not isinstance(values, Mapping):
            raise UserError(
                f"{path}: must be a mapping of options, got {values!r}",
                key=path,
                cause=Cause.MALFORMED,
            )
        if kind in SERVED_REWARDS:
            from r1_grading.remote.remote_rewards import check_options

            check_options(kind, values)
        elif kind in GRADERS and (
            unknown_options := [v for v in values if v not in option_names(kind)]
        ):
            names = sorted(option_names(kind))
            hint = did_you_mean(unknown_options[0], names, "{}")
            hint = hint or f"; it has {', '.join(names) or 'none'}"
            raise UserError(
                f"{path}: unknown option {unknown_options[0]}{hint}",
                key=f"{path}.{unknown_options[0]}",
                cause=Cause.UNKNOWN,
            )
    return {kind: _read_numbers(kind, values) for kind, values in options.items()}


def _read_numbers(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a reward with numbers and truth values read.

    Only a registered reward's are read, whose defaults have these types."""
    parsed_options = dict(values)
    defaults = _default_options(kind) if kind in GRADERS else {}
    for name, value in values.items():
        number_type = type(defaults.get(name))
        if number_type in (bool, int, float):
            try:
                parsed_options[name] = read_scalar(value, [number_type])
            except ValueError as error:
                key = f"rewards.options.{kind}.{name}"
                raise UserError(f"{key}: {error}", key=key, cause=Cause.MALFORMED) from None
    return parsed_options


@functools.cache
def option_names(kind: str) -> frozenset[str]:
    """Return the keyword arguments of a registered reward that a recipe may set.

    This imports the reward; `math` and `logic` import large libraries (1 to 2 s)."""
    return frozenset(_default_options(kind))


@functools.cache
def _default_options(kind: str) -> dict[str, Any]:
    parameters = inspect.signature(find_function(GRADERS[kind])).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in RUN_ARGUMENTS
    }


def reward_arguments(
    kind: str,
    options: Mapping[str, Mapping[str, Any]],
    fields: Mapping[str, Any],
    run_arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keyword arguments of reward `kind`.

    For rewards in worker processes the prompt's own `fields` override the options. For served
    rewards only the recipe selects the service and the key: a data set with a column "model"
    changes nothing, nor does one with a column "url", which could collect keys. Only if there are
    no options (`megatron-r1 score`) do the settings of a line count, except api_key_env.

    Args:
        kind: the reward's name.
        options: kind → the recipe's options.
        fields: the prompt's other columns.
        run_arguments: those of `RUN_ARGUMENTS` for the response; they override options and
            fields."""
    reward_options = options.get(kind, {})
    if kind in SERVED_REWARDS:
        from r1_grading.remote.remote_rewards import settings_names

        refused_names = settings_names(kind) if reward_options else {"api_key_env"}
        fields = {name: value for name, value in fields.items() if name not in refused_names}
        return {**fields, **reward_options, **run_arguments}
    if kind in RESPONSE_ONLY_REWARDS:
        names = option_names(kind)
        fields = {name: value for name, value in fields.items() if name in names}
    return {**reward_options, **fields, **run_arguments}
