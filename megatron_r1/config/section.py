"""The base of every section of a recipe, its marks, and settings by their dotted keys.

Marks are of settings that may change during a run or when it is resumed; two sets of settings are
compared by their keys."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from r1_grading.base.values import read_field

T = TypeVar("T")


class Section(BaseModel):
    """Typed, immutable settings; unknown keys are refused.

    A field's meaning is the docstring below it (`config.keys`), or its `description` where
    the text is computed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_field_value(cls, value: Any, info: ValidationInfo) -> Any:
        return read_field(cls, value, info)


@dataclass(frozen=True)
class Mark:
    """Marks a field for `marked_keys`.

    Attributes:
        within: dotted keys of a mapping that are meant; default: the whole field."""

    within: tuple[str, ...] = ()


class ResumableMark(Mark):
    """Marks a field that may differ when a run continues."""


Resumable = Annotated[T, ResumableMark()]
"""The type of a setting that changes how long, how often or where a run computes, not what it
learns: it may differ when the run continues."""


class ScheduledMark(Mark):
    """Marks a field that `rl.schedule` can change during a run."""


Scheduled = Annotated[T, ScheduledMark()]
"""The type of a setting that the controller reads anew at every step; others are built into ranks
and engines when they start."""


def marked_keys(model: type[BaseModel], mark_type: type[Mark], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the fields that have a mark, also those of sections.

    Of a mapping of sections they are as `teacher.by_source.*.engines`.

    Args:
        model: a section, or the recipe of sections.
        mark_type: the class of the mark.
        prefix: what stands before each key."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        marks = [mark for mark in field.metadata if isinstance(mark, mark_type)]
        if marks:
            yield from [f"{key}.{part}" for part in marks[0].within] or [key]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from marked_keys(field.annotation, mark_type, f"{key}.")
        elif get_origin(field.annotation) is dict:
            entry = get_args(field.annotation)[1]
            if isinstance(entry, type) and issubclass(entry, BaseModel):
                yield from marked_keys(entry, mark_type, f"{key}.*.")


_ABSENT = object()


def flatten_sections(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping of dotted keys, in order; lists stay values."""
    flat_settings: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat_settings.update(flatten_sections(value, f"{prefix}{key}."))
        else:
            flat_settings[f"{prefix}{key}"] = value
    return flat_settings


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, or that only one side has.

    Those of `after` come first."""
    return [
        key
        for key in dict.fromkeys([*after, *before])
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def value_text(values: Mapping[str, Any], key: str, absent: str = "not set") -> str:
    """Return the value of a key as a message quotes it, `absent` where there is none.

    Args:
        values: the values by dotted key.
        key: the dotted key.
        absent: the text for a key that is not there."""
    return repr(values[key]) if key in values else absent


def is_within(key: str, names: Collection[str]) -> bool:
    """Return whether a dotted key is one of `names` or lies in a section or list that is.

    Args:
        key: the dotted key.
        names: dotted keys; in `a.*.b` the star stands for any entry of a mapping."""
    patterns = (re.escape(name).replace(r"\*", ".+") for name in names)
    return any(re.match(rf"{pattern}(?:[.[]|\Z)", key) for pattern in patterns)
