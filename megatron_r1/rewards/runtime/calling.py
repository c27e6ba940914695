"""Why a reward function cannot be called with what it is given, for the person who wrote either."""

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from megatron_r1.rewards import REGISTRY


def describe_misfit(grader: Callable[..., Any], target: str, fields: Mapping[str, Any]) -> str:
    """What grader(response, truth, **fields) lacks or has too much of, with the remedy; "" for a
    call that fits. target: the grader's "module:function"."""
    try:
        parameters = list(inspect.signature(grader).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        return ""
    kind = next((name for name, path in REGISTRY.items() if path == target), target)
    right = f"def {target.partition(':')[2]}(response, truth, *, …, **entry) -> Grade"
    kinds = {parameter.kind for parameter in parameters}
    ordered = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in parameters if parameter.kind in ordered]
    if len(positional) < 2 and Parameter.VAR_POSITIONAL not in kinds:
        return f"reward {kind!r} must take a response and a truth: {right}"
    gathering = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p not in positional[:2] and p.kind not in gathering]
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
            f"parameters with **entry, {right}"
        )
    return ""
