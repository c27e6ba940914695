"""Explain to a user why a reward function cannot be called with its arguments."""

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from megatron_r1.rewards import REGISTRY

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def explain_call(function: Callable[..., Any], target: str, fields: Mapping[str, Any]) -> str:
    """Return which argument function(response, truth, **fields) lacks or refuses, and the remedy.

    "" for a call that fits the signature. target: the function's "module:function".
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        return ""
    kind = next((name for name, path in REGISTRY.items() if path == target), target)
    signature = f"def {target.partition(':')[2]}(response, truth, *, …, **entry) -> Grade"
    kinds = {parameter.kind for parameter in parameters}
    positional = [parameter for parameter in parameters if parameter.kind in POSITIONAL]
    if len(positional) < 2 and Parameter.VAR_POSITIONAL not in kinds:
        return f"reward {kind!r} must take a response and a truth: {signature}"
    named = [p for p in parameters if p not in positional[:2] and p.kind not in VARIADIC]
    missing = [p.name for p in named if p.default is p.empty and p.name not in fields]
    if missing:
        return (
            f"reward {kind!r} needs {', '.join(missing)}: give it in the row, or for all rows as "
            f"rewards.options.{kind}.{missing[0]}"
        )
    refused = sorted(fields.keys() - {parameter.name for parameter in named})
    if refused and Parameter.VAR_KEYWORD not in kinds:
        return (
            f"reward {kind!r} is called with {refused[0]!r} and does not take it: end its "
            f"parameters with **entry, {signature}"
        )
    return ""
