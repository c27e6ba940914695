"""The dotted keys of recipes as lines of YAML, each with its default and its meaning."""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.key_aliases import KeyAlias, describe_aliases, find_aliases
from megatron_r1.config.setting_keys import is_within
from megatron_r1.config.yaml_text import format_value

ENTRY = {list: "[]", dict: ".NAME"}
"""The part of a dotted key that stands for any entry of a list or mapping."""


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted key, model that has the field) in order, those of sections within sections too.

    An entry of a list is `key[].name`, one of a mapping `key.NAME.name`."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        nested_entries = list(nested_models(field.annotation))
        if not nested_entries or not isinstance(
            field.get_default(call_default_factory=True), BaseModel
        ):
            yield key, model
        for part, entry in nested_entries:
            yield from dotted_keys(part, f"{key}{entry}.")


def describe_keys(models: Sequence[type[BaseModel]], names: Sequence[str] = ()) -> str:
    """Return a line such as `rl.group_size: 16   # responses per prompt` per key.

    Args:
        models: their sections have different names.
        names: what to show; default: all. Sections or keys (`rl`, `sample.keep`), words of other
            libraries (`ALIASES`, each with a line of its own), or words that stand in a
            key's name or meaning.

    Raises:
        UserError: any other name."""
    fields = {key: home for model in models for key, home in dotted_keys(model)}
    meanings = {home: _field_docstrings(home) for home in set(fields.values())}
    lines = {
        key: _describe_key(key, home.model_fields[leaf], meanings[home].get(leaf, ""))
        for key, home in fields.items()
        for leaf in [key.rpartition(".")[2]]
    }
    if not names:
        return "\n".join(lines.values())
    phrase = " ".join(names)
    if len(names) > 1 and find_aliases(phrase):
        names = [phrase]
    rows: list[KeyAlias] = []
    selection: set[str] = set()
    for name in names:
        matching_keys = [key for key in lines if is_within(key, [name])]
        if not matching_keys:
            aliases = find_aliases(name)
            rows += [row for row in aliases if row not in rows]
            matching_keys = [key for row in aliases for key in lines if key in row.keys]
        selection.update(matching_keys or _search_keys(name, lines))
        if not selection:
            known_keys = {key.rpartition(".")[0] for key in fields} | fields.keys()
            suggestion = did_you_mean(name, known_keys, "{}")
            sections = [section for model in models for section in model.model_fields]
            suggestion = suggestion or f"; there are {', '.join(sections)}"
            raise UserError(
                f"keys {name}: no section or key is called so, and none mentions it{suggestion}",
                key=name,
                cause=Cause.UNKNOWN,
            )
    return "\n".join(
        filter(None, [describe_aliases(rows), *(lines[k] for k in lines if k in selection)])
    )


def _search_keys(name: str, lines: Mapping[str, str]) -> list[str]:
    """Return the keys in whose name or meaning a word, or all words of a text, stand."""
    words = re.split(r"[\s_-]+", name.casefold())
    return [
        key
        for key, line in lines.items()
        if all(re.search(rf"(?<![a-z]){re.escape(word)}", line.casefold()) for word in words)
    ]


def boolean_keys(model: type[BaseModel]) -> set[str]:
    """Return the keys that are true or false."""
    return {
        key
        for key, home in dotted_keys(model)
        if home.model_fields[key.rpartition(".")[2]].annotation is bool
    }


def _field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> the docstring below it, of `model` and of its bases.

    The source is parsed only when docstrings are printed: with pydantic's use_attribute_docstrings
    each import of the configuration would parse it, which takes 218 instead of 170 ms."""
    docstrings = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            (definition,) = ast.parse(inspect.getsource(base)).body
            assert isinstance(definition, ast.ClassDef)
            for statement, next_statement in pairwise(definition.body):
                match statement, next_statement:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        docstrings[name] = text
    return docstrings


def nested_models(annotation: Any, entry: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models in a type such as `list[Model] | None`.

    Each comes with the suffix of its keys (`ENTRY`)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, entry
    else:
        for part in get_args(annotation):
            yield from nested_models(part, entry + ENTRY.get(get_origin(annotation), ""))


def _describe_key(key: str, field: FieldInfo, docstring: str) -> str:
    default = field.get_default(call_default_factory=True)
    text = (
        "(required)" if default is PydanticUndefined else format_value(to_jsonable_python(default))
    )
    meaning = " ".join((field.description or docstring).split())
    return f"{key}: {text}" + (f"   # {meaning}" if meaning else "")
