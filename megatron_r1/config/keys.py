"""Every key that a recipe may have: its default and its meaning, as lines of dotted YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_r1.config.overrides import as_text
from megatron_r1.errors import did_you_mean

PLACES = {list: "[]", dict: ".NAME"}
"""How the dotted key of an entry goes on after that of its list or mapping."""


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key → field, in order, those of sections within sections too. An entry of a list is
    `key[].name`, one of a mapping `key.NAME.name`."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        within = list(_models_within(field.annotation))
        if not within or not isinstance(field.get_default(call_default_factory=True), BaseModel):
            yield key, field
        for part, place in within:
            yield from keys_of(part, f"{key}{place}.")


def describe(models: Sequence[type[BaseModel]], wanted: Sequence[str] = ()) -> str:
    """`rl.group_size: 16   # outputs of a question`, a line per key.

    models: whose sections have different names. wanted: sections or keys (`rl`, `sample.keep`) to
    show; all where empty. Raises ValueError for one that is none.
    """
    found = {key: field for model in models for key, field in keys_of(model)}
    for name in wanted:
        if not any(_is_under(key, name) for key in found):
            known = {key.rpartition(".")[0] for key in found} | found.keys()
            near = did_you_mean(name, known, "{}")
            sections = [section for model in models for section in model.model_fields]
            near = near or f"; there are {', '.join(sections)}"
            raise ValueError(f"keys {name}: no section or key is called so{near}")
    return "\n".join(
        _line(key, field)
        for key, field in found.items()
        if not wanted or any(_is_under(key, name) for name in wanted)
    )


def switches(model: type[BaseModel]) -> set[str]:
    """The keys that are true or false."""
    return {key for key, field in keys_of(model) if field.annotation is bool}


def _line(key: str, field: FieldInfo) -> str:
    meaning = f"   # {field.description}" if field.description else ""
    return f"{key}: {_default(field)}{meaning}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "(required)"
    return as_text(_plain(default))


def _plain(value: Any) -> Any:
    """Models as mappings, tuples as lists: what YAML can say."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _models_within(annotation: Any, place: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, place
    else:
        for part in get_args(annotation):
            yield from _models_within(part, place + PLACES.get(get_origin(annotation), ""))


def _is_under(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))
