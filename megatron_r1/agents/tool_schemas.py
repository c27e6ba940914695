"""Makes a tool's schema of a method, from its signature and its docstring.

transformers makes the schema, and pydantic that of the types which transformers does not know."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from megatron_r1.agents.method_arguments import argument_adapters, named_parameters


def tool_schema(name: str, bound: Callable[..., Any]) -> dict[str, Any]:
    """Return the schema of a bound method, from its signature and its docstring in Google's form.
    If an argument has no documentation or no type, the whole docstring is the description.

    Args:
        name: the attribute's name; `__name__` is another one under a decorator without
            `functools.wraps`.
        bound: the method."""
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
    parameters, names = function["parameters"], {p.name for p in named_parameters(bound)}
    for undeclared_name in parameters["properties"].keys() - names:  # a documented *args
        del parameters["properties"][undeclared_name]
    parameters["required"] = [name for name in parameters.get("required", ()) if name in names]
    _complete_schema(parameters, argument_adapters(bound))
    return schema


def _plain_schema(method: Callable[..., Any]) -> dict[str, Any]:
    parameters = named_parameters(method)
    properties: dict[str, Any] = {parameter.name: {} for parameter in parameters}
    required_names = [p.name for p in parameters if p.default is p.empty]
    return {
        "type": "function",
        "function": {
            "description": inspect.getdoc(method) or "",
            "parameters": {"type": "object", "properties": properties, "required": required_names},
        },
    }


def _complete_schema(schema: dict[str, Any], adapters: Mapping[str, TypeAdapter[Any]]) -> None:
    """Add pydantic's schema of each argument whose type transformers does not know: it describes
    enumerations, dataclasses and dates as plain objects."""
    properties = schema["properties"]
    for name in properties.keys() & adapters.keys():
        description = {key: text for key, text in properties[name].items() if key == "description"}
        if properties[name].items() <= {"type": "object", "nullable": True, **description}.items():
            with contextlib.suppress(PydanticUserError):  # no JSON stands for this type
                argument_schema = adapters[name].json_schema()
                argument_schema.pop("title", None)
                if definitions := argument_schema.pop("$defs", None):
                    schema.setdefault("$defs", {}).update(definitions)
                properties[name] = {**argument_schema, **description}
