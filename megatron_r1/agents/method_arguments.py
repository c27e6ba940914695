"""Turns the arguments of a call into those that an environment's method takes.

A tool call's JSON values are converted to the types in the method's signature, as pydantic converts
them; `reset` gets the entries of the row that its signature names."""

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError


def named_parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a method, except `*args` and `**kwargs`."""
    parameters = inspect.signature(method).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def argument_adapters(method: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    """Return pydantic's converter for each argument, by name. An argument is left out if it has no
    type, a type that pydantic has no schema for, or one imported for type checkers only."""
    function = inspect.unwrap(method)
    return _parameter_adapters(
        getattr(function, "__func__", function)
    )  # bound methods differ by episode


@functools.lru_cache(maxsize=1024)
def _parameter_adapters(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    names = getattr(function, "__globals__", None)
    adapters = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if name == "return":
            continue
        # One at a time: get_type_hints raises for all where one names something not imported.
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError, TypeError, PydanticUserError):
            hint = typing.get_type_hints(holder, names, include_extras=True)[name]
            try:
                adapters[name] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
            except PydanticUserError:  # a type with a configuration of its own
                adapters[name] = TypeAdapter(hint)
    return adapters


def call_arguments(
    method: Callable[..., Any], values: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that pass `values`, given by name, to the
    method.

    Raises:
        TypeError: the method does not take a name.
    """
    parameters = inspect.signature(method).parameters.values()
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in values]
    by_name = {name: value for name, value in values.items() if name not in first}
    bound = inspect.signature(method).bind(*(values[name] for name in first), **by_name)
    return bound.args, bound.kwargs


def convert_arguments(method: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values converted to the types of a tool's arguments, such as members of an Enum.

    Raises:
        ValueError: a value cannot be converted.
    """
    parameters, adapters = inspect.signature(method).parameters, argument_adapters(method)
    result = dict(values)
    for name, value in values.items():
        if name not in adapters or name not in parameters:
            continue
        if value is None and parameters[name].default is None:
            continue  # `limit: int = None`: the annotation forbids the method's own default
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
    """Return the entries of a row that `reset` takes: all of them, if it ends in **row."""
    parameters = inspect.signature(reset).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(row)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in row.items() if name in names}


def missing_arguments(reset: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that `reset` requires and `values` lacks."""
    parameters = named_parameters(reset)
    return [p.name for p in parameters if p.default is p.empty and p.name not in values]
