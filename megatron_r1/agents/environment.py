"""The form of an environment: a class whose public methods are tools.

    class Calculator:
        def reset(self, truth, **row):
            self.truth, self.answer = str(truth), ""

        def calculate(self, expression: str) -> str:
            '''Evaluate an arithmetic expression.

            Args:
                expression: numbers with + - * and brackets.
            '''
            ...

        def final_answer(self, text):
            self.answer = text.strip()

        def get_reward(self) -> float:
            return float(self.answer == self.truth)

`reset` begins an episode with a row of the data, and may return the question's text; the row's own
is used otherwise. `get_reward` may be left out: the reward of the row's kind then grades the last
answer. An attribute `done` that is true after a call ends the episode; `final_answer`, if the
class has it, is a method that gets the text of the last answer before `get_reward`; `close` is
called when the episode is over. Methods may be coroutines. docs/agents.md has the details."""

import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.agents.tool_schemas import tool_schema
from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.base.user_code import find_value

SHIPPED_ENVIRONMENTS = {
    "calculator": "megatron_r1.agents.shipped_environments:Calculator",
    "gym": "megatron_r1.agents.shipped_environments:Gym",
    "lookup": "megatron_r1.agents.shipped_environments:Lookup",
    "python": "megatron_r1.agents.shipped_environments:Python",
    "retrieval": "megatron_r1.agents.shipped_environments:Retrieval",
}
"""Environments that come with this package: the short name of each with its class."""
RESERVED_METHODS = ("reset", "get_reward", "final_answer", "close")
"""Public methods that are not tools."""


@dataclass(frozen=True)
class EnvironmentDescription:
    """The description of an environment's class.

    Attributes:
        tools: the schemas of its tools, in OpenAI's form.
        has_reward: whether the class has `get_reward`.
        parameters: the arguments of the class, and whether each is required; None where the class
            takes any argument.
        misspelt: tools whose name is close to that of a reserved method which the class lacks, each
            with the reserved name."""

    tools: list[dict[str, Any]]
    has_reward: bool
    parameters: dict[str, bool] | None = None
    misspelt: dict[str, str] = field(default_factory=dict)

    def list_tools(self) -> str:
        """Return the tools with the names of their arguments: `get(key, default), size()`."""
        return ", ".join(
            f"{tool['name']}({', '.join(tool['parameters']['properties'])})"
            + (
                f" (did you mean {suggestion}?)"
                if (suggestion := self.misspelt.get(tool["name"]))
                else ""
            )
            for tool in (tool["function"] for tool in self.tools)
        )


def environment_target(name: str) -> str:
    """Return the "module:Class" of `agents.environment`.

    Raises:
        UserError: an unknown name.
    """
    if name in SHIPPED_ENVIRONMENTS:
        return SHIPPED_ENVIRONMENTS[name]
    module, _, attribute = name.partition(":")
    if module and attribute.isidentifier() and not module.endswith(".py"):
        return name
    suggestion = did_you_mean(name, SHIPPED_ENVIRONMENTS)
    if file_name := re.fullmatch(r"(\w[\w.]*?)(?:\.py)?[.:](\w+)", name):
        suggestion = f"; did you mean {file_name[1]}:{file_name[2]}?"
    raise UserError(
        f"agents.environment: unknown environment {name!r}{suggestion} (known: "
        f"{', '.join(SHIPPED_ENVIRONMENTS)}; your own is written 'module:Class')",
        key="agents.environment",
        cause=Cause.UNKNOWN,
    )


def find_environment(target: str) -> type:
    """Import and return the class named "module:Class".

    Raises:
        UserError: there is no such class.
        Exception: what its module raises when it is imported.
    """
    return find_value(target, "environment class", inspect.isclass)


def describe_environment(environment: type) -> EnvironmentDescription:
    """Return the description of a class.

    Raises:
        UserError: the class is not an environment.
    """
    name = environment.__name__
    public_methods = _public_methods(environment)
    tools = [
        tool_schema(*method)
        for method in public_methods.items()
        if method[0] not in RESERVED_METHODS
    ]
    if "reset" not in public_methods:
        raise UserError(
            f"agents.environment: {name} has no method reset(self, **row), which begins an episode",
            key="agents.environment",
            cause=Cause.MISSING,
        )
    if "done" in public_methods:
        raise UserError(
            f"agents.environment: {name}.done is a method; it is reserved for an attribute that "
            "ends the episode: rename the method, or set self.done",
            key="agents.environment",
            cause=Cause.CONFLICT,
        )
    if not tools:
        raise UserError(
            f"agents.environment: {name} has no public method besides "
            f"{', '.join(RESERVED_METHODS)}, so "
            "the model would have no tool; add one, or leave agents out",
            key="agents.environment",
            cause=Cause.EMPTY,
        )
    absent_methods = [method for method in RESERVED_METHODS if method not in public_methods]
    matches = {
        method: difflib.get_close_matches(method, absent_methods, n=1, cutoff=0.85)
        for method in public_methods.keys() - set(RESERVED_METHODS)
    }
    misspelt_names = {method: names[0] for method, names in matches.items() if names}
    return EnvironmentDescription(
        tools, "get_reward" in public_methods, _constructor_parameters(environment), misspelt_names
    )


def check_parameters(
    name: str, description: EnvironmentDescription, values: Mapping[str, Any]
) -> None:
    """Raise UserError where `agents.parameters` are not the arguments of the class.

    Args:
        name: the value of `agents.environment`.
        description: the environment's class.
        values: the values of `agents.parameters`.
    """
    parameters, title = description.parameters, name.rpartition(":")[2]
    if parameters is None:
        return
    for key in values:
        if key not in parameters:
            raise UserError(
                f"agents.parameters: {title} takes {', '.join(parameters) or 'no arguments'}, not "
                f"{key!r}{did_you_mean(key, parameters)}",
                key=f"agents.parameters.{key}",
                cause=Cause.UNKNOWN,
            )
    if missing_parameters := [
        key for key, is_required in parameters.items() if is_required and key not in values
    ]:
        raise UserError(
            f"agents.parameters: {title} needs {', '.join(missing_parameters)}; set "
            f"agents.parameters: {{{missing_parameters[0]}: …}}",
            key=f"agents.parameters.{missing_parameters[0]}",
            cause=Cause.MISSING,
        )


def _constructor_parameters(environment: type) -> dict[str, bool] | None:
    try:
        parameters = inspect.signature(environment).parameters.values()
    except ValueError:  # a class of a built-in type
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_POSITIONAL}


def _public_methods(environment: type) -> dict[str, Callable[..., Any]]:
    """Return the public methods of a class by name, as an instance has them: without `self`."""
    methods = {}
    for name, value in inspect.getmembers(environment, inspect.isroutine):
        static_value = inspect.getattr_static(environment, name, None)
        if name.startswith("_") or isinstance(static_value, functools.cached_property):
            continue
        if isinstance(static_value, types.FunctionType):
            _require_self(f"{environment.__name__}.{name}", static_value)
        is_bound = isinstance(static_value, staticmethod | classmethod | types.MethodDescriptorType)
        bound = value if is_bound or not hasattr(value, "__get__") else value.__get__(object())
        methods[name] = bound
    return methods


def _require_self(name: str, method: Callable[..., Any]) -> None:
    names = [str(p).partition(":")[0] for p in inspect.signature(method).parameters.values()]
    if not names or (names[0] != "self" and not names[0].startswith("*")):
        arguments, method_name = ", ".join(names), name.rpartition(".")[2]
        raise UserError(
            f"agents.environment: {name}({arguments}) has no self; write "
            f"{method_name}({', '.join(['self', *names])}), or put @staticmethod above it",
            key="agents.environment",
            cause=Cause.MALFORMED,
        )
