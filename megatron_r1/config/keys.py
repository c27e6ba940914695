"""Every key that a recipe may have: its default and its meaning, as lines of dotted YAML."""

import ast
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from megatron_r1.config.yaml_text import as_text
from megatron_r1.errors import Cause, UserError, did_you_mean

ENTRY = {list: "[]", dict: ".NAME"}
"""The part of a dotted key that stands for any entry of a list or mapping."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted key, model that has the field) in order, those of sections within sections too.
    An entry of a list is `key[].name`, one of a mapping `key.NAME.name`."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        within = list(models_within(field.annotation))
        if not within or not isinstance(field.get_default(call_default_factory=True), BaseModel):
            yield key, model
        for part, entry in within:
            yield from keys_of(part, f"{key}{entry}.")


def describe(models: Sequence[type[BaseModel]], chosen: Sequence[str] = ()) -> str:
    """Return a line such as `rl.group_size: 16   # responses per question` per key.

    models: their sections have different names. chosen: sections or keys (`rl`, `sample.keep`) to
    show; default: all. Raises UserError for a name that is neither."""
    fields = {key: home for model in models for key, home in keys_of(model)}
    for name in chosen:
        if not any(_is_under(key, name) for key in fields):
            known = {key.rpartition(".")[0] for key in fields} | fields.keys()
            near = did_you_mean(name, known, "{}")
            sections = [section for model in models for section in model.model_fields]
            near = near or f"; there are {', '.join(sections)}"
            raise UserError(
                f"keys {name}: no section or key is called so{near}", key=name, cause=Cause.UNKNOWN
            )
    shown = {
        key: home
        for key, home in fields.items()
        if not chosen or any(_is_under(key, name) for name in chosen)
    }
    meanings = {home: docstrings(home) for home in set(shown.values())}
    return "\n".join(
        _line(key, home.model_fields[leaf], meanings[home].get(leaf, ""))
        for key, home in shown.items()
        for leaf in [key.rpartition(".")[2]]
    )


def switches(model: type[BaseModel]) -> set[str]:
    """Return the keys that are true or false."""
    return {
        key
        for key, home in keys_of(model)
        if home.model_fields[key.rpartition(".")[2]].annotation is bool
    }


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> the docstring below it, of `model` and of its bases.

    The source is parsed only when docstrings are printed: with pydantic's use_attribute_docstrings
    each import of the configuration would parse it, which takes 48 ms beside the other 170."""
    below = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            (definition,) = ast.parse(inspect.getsource(base)).body
            assert isinstance(definition, ast.ClassDef)
            for statement, following in pairwise(definition.body):
                match statement, following:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        below[name] = text
    return below


def models_within(annotation: Any, entry: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models in a type such as `list[Model] | None`, each with the suffix of its keys
    (`ENTRY`)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, entry
    else:
        for part in get_args(annotation):
            yield from models_within(part, entry + ENTRY.get(get_origin(annotation), ""))


def _line(key: str, field: FieldInfo, docstring: str) -> str:
    default = field.get_default(call_default_factory=True)
    text = "(required)" if default is PydanticUndefined else as_text(to_jsonable_python(default))
    meaning = " ".join((field.description or docstring).split())
    return f"{key}: {text}" + (f"   # {meaning}" if meaning else "")


def _is_under(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))
