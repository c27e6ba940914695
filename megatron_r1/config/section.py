"""The base of every section of a recipe, and the marks of its settings.

A mark says that a setting may change during a run, or when the run is resumed."""

from collections.abc import Iterator
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
