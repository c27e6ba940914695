"""Arguments of a reward beside the response: a recipe's options and a prompt's fields."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from megatron_r1.errors import Cause, UserError, did_you_mean
from megatron_r1.rewards import FORM_REWARDS, REGISTRY, REMOTE, resolve
from megatron_r1.scalars import read_scalar
from megatron_r1.user_code import find_function

FACTS = ("num_tokens", "opened", "question")
"""Arguments that a run gives for each sample; neither an option nor a prompt's field overrides
them."""


def call_fields(
    kind: str,
    options: Mapping[str, Mapping[str, Any]],
    fields: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keyword arguments of reward `kind`.

    For rewards in worker processes the prompt's own `fields` override the options. For served
    rewards only the recipe selects the service and the key: a data set with a column "model"
    changes nothing, nor does one with a column "url", which could collect keys. Only if there are
    no options (`megatron-r1 score`) do the settings of a line count, except api_key_env. `facts`
    override options and fields."""
    given = options.get(kind, {})
    if kind in REMOTE:
        from megatron_r1.rewards.remote.runner import settings_names  # aiohttp: a recipe needs none

        refused = settings_names(kind) if given else {"api_key_env"}
        fields = {name: value for name, value in fields.items() if name not in refused}
        return {**fields, **given, **facts}
    if kind in FORM_REWARDS:
        names = option_names(kind)
        fields = {name: value for name, value in fields.items() if name in names}
    return {**given, **fields, **facts}


def read_options(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Check a recipe's `rewards.options`, reward → {name: value}, and return it.

    Raises UserError naming the reward and the key for an unknown reward, a value that is not a
    mapping, and an option that a registered reward does not have. Options of a user's own reward
    are not checked: its module runs in worker processes only."""
    for kind, values in options.items():
        path = f"rewards.options.{kind}"
        try:
            resolve(kind)
        except UserError as error:
            raise UserError(f"{path}: {error}", key=path, cause=error.cause) from None
        if not isinstance(values, Mapping):
            raise UserError(
                f"{path}: must be a mapping of options, got {values!r}",
                key=path,
                cause=Cause.MALFORMED,
            )
        if kind in REMOTE:
            from megatron_r1.rewards.remote.runner import check_options

            check_options(kind, values)
        elif kind in REGISTRY and (unknown := [v for v in values if v not in option_names(kind)]):
            known = sorted(option_names(kind))
            hint = did_you_mean(unknown[0], known, "{}")
            hint = hint or f"; it has {', '.join(known) or 'none'}"
            raise UserError(
                f"{path}: unknown option {unknown[0]}{hint}",
                key=f"{path}.{unknown[0]}",
                cause=Cause.UNKNOWN,
            )
    return {kind: _read_numbers(kind, values) for kind, values in options.items()}


def _read_numbers(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a reward with numbers and truth values read, where the reward is a
    registered one whose defaults are such."""
    read = dict(values)
    defaults = _defaults(kind) if kind in REGISTRY else {}
    for name, value in values.items():
        wanted = type(defaults.get(name))
        if wanted in (bool, int, float):
            try:
                read[name] = read_scalar(value, [wanted])
            except ValueError as error:
                key = f"rewards.options.{kind}.{name}"
                raise UserError(f"{key}: {error}", key=key, cause=Cause.MALFORMED) from None
    return read


@functools.cache
def option_names(kind: str) -> frozenset[str]:
    """Return the keyword arguments of a registered reward that a recipe may set.

    This imports the reward; `math` and `logic` import large libraries (1 to 2 s)."""
    return frozenset(_defaults(kind))


@functools.cache
def _defaults(kind: str) -> dict[str, Any]:
    parameters = inspect.signature(find_function(REGISTRY[kind])).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in FACTS
    }
