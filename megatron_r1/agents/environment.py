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
answer. An attribute `done` that is true after a call ends the episode; `final_answer`, if the class
has it, is a method that gets the text of the last answer before `get_reward`; `close` is called
when the episode is over. Methods may be coroutines. docs/agents.md has the details."""

import contextlib
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from megatron_r1.errors import UserError, did_you_mean
from megatron_r1.user_code import find

SHIPPED = {
    "calculator": "megatron_r1.agents.environments.calculator:Calculator",
    "gym": "megatron_r1.agents.environments.gym:Gym",
    "lookup": "megatron_r1.agents.environments.lookup:Lookup",
    "python": "megatron_r1.agents.environments.python:Python",
    "retrieval": "megatron_r1.agents.environments.retrieval:Retrieval",
}
"""Environments that come with this package: the short name of each with its class."""
RESERVED = ("reset", "get_reward", "final_answer", "close")
"""Public methods that are not tools."""


@dataclass(frozen=True)
class Description:
    """The tools of an environment's class, as schemas in OpenAI's form, and whether it grades: has
    `get_reward`.

    parameters: the arguments of the class, and whether each is required; None where it takes any.
    misspelt: tools with nearly the name of a reserved method that the class lacks, and that name.
    """

    tools: list[dict[str, Any]]
    grades: bool
    parameters: dict[str, bool] | None = None
    misspelt: dict[str, str] = field(default_factory=dict)

    def list_tools(self) -> str:
        """Return the tools with the names of their arguments: `get(key, default), size()`."""
        return ", ".join(
            f"{tool['name']}({', '.join(tool['parameters']['properties'])})"
            + (f" (did you mean {near}?)" if (near := self.misspelt.get(tool["name"])) else "")
            for tool in (tool["function"] for tool in self.tools)
        )


def target_of(name: str) -> str:
    """Return the "module:Class" of `agents.environment`. Raises UserError for an unknown name."""
    if name in SHIPPED:
        return SHIPPED[name]
    module, _, attribute = name.partition(":")
    if module and attribute.isidentifier() and not module.endswith(".py"):
        return name
    near = did_you_mean(name, SHIPPED)
    if own := re.fullmatch(r"(\w[\w.]*?)(?:\.py)?[.:](\w+)", name):
        near = f"; did you mean {own[1]}:{own[2]}?"
    raise UserError(
        f"agents.environment: unknown environment {name!r}{near} (known: "
        f"{', '.join(SHIPPED)}; your own is written 'module:Class')"
    )


def find_environment(target: str) -> type:
    """Import and return the class of "module:Class". Raises UserError where there is none, and what
    its module raises at its import."""
    return find(target, "environment class", inspect.isclass)


def describe(environment: type) -> Description:
    """Return the description of a class. Raises UserError for one that is no environment."""
    name = environment.__name__
    public = _public_methods(environment)
    tools = [tool_schema(*method) for method in public.items() if method[0] not in RESERVED]
    if "reset" not in public:
        raise UserError(
            f"agents.environment: {name} has no method reset(self, **row), which begins an episode"
        )
    if "done" in public:
        raise UserError(
            f"agents.environment: {name}.done is a method; it is reserved for an attribute that "
            "ends the episode: rename the method, or set self.done"
        )
    if not tools:
        raise UserError(
            f"agents.environment: {name} has no public method besides {', '.join(RESERVED)}, so "
            "the model would have no tool; add one, or leave agents out"
        )
    lacking = [method for method in RESERVED if method not in public]
    near = {
        method: difflib.get_close_matches(method, lacking, n=1, cutoff=0.85)
        for method in public.keys() - set(RESERVED)
    }
    misspelt = {method: names[0] for method, names in near.items() if names}
    return Description(tools, "get_reward" in public, _parameters(environment), misspelt)


def check_parameters(name: str, description: Description, values: Mapping[str, Any]) -> None:
    """Raise UserError where `agents.parameters` are not the arguments of the class. name: of
    `agents.environment`."""
    known, title = description.parameters, name.rpartition(":")[2]
    if known is None:
        return
    for key in values:
        if key not in known:
            raise UserError(
                f"agents.parameters: {title} takes {', '.join(known) or 'no arguments'}, not "
                f"{key!r}{did_you_mean(key, known)}"
            )
    if missing := [key for key, is_required in known.items() if is_required and key not in values]:
        raise UserError(
            f"agents.parameters: {title} needs {', '.join(missing)}; set agents.parameters: "
            f"{{{missing[0]}: …}}"
        )


def _parameters(environment: type) -> dict[str, bool] | None:
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
        static = inspect.getattr_static(environment, name, None)
        if name.startswith("_") or isinstance(static, functools.cached_property):
            continue
        if isinstance(static, types.FunctionType):
            _require_self(f"{environment.__name__}.{name}", static)
        is_bound = isinstance(static, staticmethod | classmethod | types.MethodDescriptorType)
        bound = value if is_bound or not hasattr(value, "__get__") else value.__get__(object())
        methods[name] = bound
    return methods


def _require_self(name: str, method: Callable[..., Any]) -> None:
    names = [str(p).partition(":")[0] for p in inspect.signature(method).parameters.values()]
    if not names or (names[0] != "self" and not names[0].startswith("*")):
        given, own = ", ".join(names), name.rpartition(".")[2]
        raise UserError(
            f"agents.environment: {name}({given}) has no self; write "
            f"{own}({', '.join(['self', *names])}), or put @staticmethod above it"
        )


def tool_schema(name: str, bound: Callable[..., Any]) -> dict[str, Any]:
    """Return the schema of a bound method from its signature and docstring, in Google's form. Where
    arguments are undocumented or have no types, the whole docstring is the description. name: the
    attribute's, which is not `__name__` under a decorator without `functools.wraps`."""
    from transformers.utils import get_json_schema  # 2 s
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
    )

    try:
        schema = get_json_schema(bound)
    except (DocstringParsingException, TypeHintParsingException, NameError):
        schema = _plain_schema(bound)
    function = schema["function"]
    function.pop("return", None)
    function["name"] = name
    parameters, known = function["parameters"], {p.name for p in _named_parameters(bound)}
    for rest in parameters["properties"].keys() - known:  # a documented *args
        del parameters["properties"][rest]
    parameters["required"] = [name for name in parameters.get("required", ()) if name in known]
    _complete(parameters, _types(bound))
    return schema


def _named_parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a method without `*args` and `**kwargs`."""
    parameters = inspect.signature(method).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _plain_schema(method: Callable[..., Any]) -> dict[str, Any]:
    parameters = _named_parameters(method)
    properties: dict[str, Any] = {parameter.name: {} for parameter in parameters}
    required = [p.name for p in parameters if p.default is p.empty]
    return {
        "type": "function",
        "function": {
            "description": inspect.getdoc(method) or "",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _complete(schema: dict[str, Any], adapters: Mapping[str, TypeAdapter[Any]]) -> None:
    """Put in pydantic's schema of each argument that has none: transformers calls enumerations,
    dataclasses and dates objects."""
    properties = schema["properties"]
    for name in properties.keys() & adapters.keys():
        described = {key: text for key, text in properties[name].items() if key == "description"}
        if properties[name].items() <= {"type": "object", "nullable": True, **described}.items():
            with contextlib.suppress(PydanticUserError):  # no JSON stands for this type
                found = adapters[name].json_schema()
                found.pop("title", None)
                if definitions := found.pop("$defs", None):
                    schema.setdefault("$defs", {}).update(definitions)
                properties[name] = {**found, **described}


def _types(method: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Return the converter of each argument. Arguments are left out that have no type, one that
    pydantic has no schema for, or one that is imported for type checkers only."""
    function = inspect.unwrap(method)
    return _types_of(getattr(function, "__func__", function))  # bound methods differ by episode


@functools.lru_cache(maxsize=1024)
def _types_of(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    names = getattr(function, "__globals__", None)
    adapters = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if name == "return":
            continue
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError, TypeError, PydanticUserError):
            hint = typing.get_type_hints(alone, names, include_extras=True)[name]
            try:
                adapters[name] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
            except PydanticUserError:  # a type with a configuration of its own
                adapters[name] = TypeAdapter(hint)
    return adapters


def call_arguments(
    method: Callable[..., Any], values: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a call with values by name. Raises TypeError for
    names that are not the method's."""
    parameters = inspect.signature(method).parameters.values()
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in values]
    by_name = {name: value for name, value in values.items() if name not in first}
    bound = inspect.signature(method).bind(*(values[name] for name in first), **by_name)
    return bound.args, bound.kwargs


def converted(method: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of JSON as the types of a tool's arguments, such as members of an Enum. Raises
    ValueError where one does not fit."""
    parameters, adapters = inspect.signature(method).parameters, _types(method)
    result = dict(values)
    for name, value in values.items():
        if name not in adapters or name not in parameters:
            continue
        if value is None and parameters[name].default is None:
            continue  # `limit: int = None`
        try:
            result[name] = adapters[name].validate_python(value)
        except ValidationError as error:
            faults = (
                f"{'.'.join(map(str, (name, *fault['loc'])))}: {fault['msg']}"
                for fault in error.errors()
            )
            raise ValueError("; ".join(faults)) from None
    return result


def row_arguments(reset: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a row that `reset` takes: all, if it ends in **row."""
    parameters = inspect.signature(reset).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(row)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in row.items() if name in names}


def missing_arguments(reset: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """Return the arguments that `reset` needs and `values` lack."""
    parameters = _named_parameters(reset)
    return [p.name for p in parameters if p.default is p.empty and p.name not in values]
