"""Settings of supervised data: files with their shares, epochs and batches."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config.section import Section
from megatron_r1.config.validation_errors import recipe_error


class MixturePart(Section):
    """One file of a mixture.

    `share`, `count` and `repeat` exclude each other; without any of them the file is used once
    (`repeat: 1`)."""

    path: str = Field(min_length=1)
    """rows of {prompt, response}, {messages} and other forms: a file, a folder, hub:NAME. See
    docs/data.md"""
    share: float | None = Field(None, gt=0, le=1)
    """share of an epoch's examples that come from this file"""
    count: int | None = Field(None, gt=0)
    """how many of its examples an epoch has"""
    repeat: float | None = Field(None, gt=0)
    """how often an epoch has the whole file"""
    columns: dict[str, str] | None = None
    """{our name: the file's column}"""
    where: dict[str, Any] = Field(default_factory=dict)
    """{column: condition}, as data.where"""

    @model_validator(mode="after")
    def _is_sized_once(self) -> Self:
        sizes = {name: getattr(self, name) for name in ("share", "count", "repeat")}
        set_sizes = {name: size for name, size in sizes.items() if size is not None}
        if len(set_sizes) > 1:
            raise UserError(
                f"{self.path} has {set_sizes}: give one of share, count and repeat",
                key=list(set_sizes)[1],
                cause=Cause.CONFLICT,
            )
        return self


class SFTConfig(Section):
    """Supervised data: files, epochs and batches."""

    data: str | list[MixturePart] = ""
    """rows of {prompt, response}, {messages} and other forms (docs/data.md), or a list of {path,
    share|count|repeat}; required by sft"""
    template: str | None = None
    """how conversations are rendered: chat, or for one question plain or a text with {question};
    default: chat where the tokenizer has a chat template"""
    epochs: float | None = Field(None, gt=0)
    """instead of run.steps: passes over the data (the paper: 2)"""
    batch_size: int = Field(128, gt=0)
    """samples per optimizer step"""
    order: Literal["shuffled", "file"] = "shuffled"
    """file: samples in the order of the file, for a curriculum"""

    @field_validator("data", mode="before")
    @classmethod
    def _data_parts(cls, data: Any) -> Any:
        return _read_parts(data) if isinstance(data, list) else data


def _read_parts(entries: list[Any]) -> list[MixturePart]:
    """Read `sft.data` given as a list.

    Raises:
        UserError: an invalid entry, an empty list, or shares that do not add up; it names the
            entry, the key and the nearest right one.
    """
    if not entries:
        raise UserError(
            "sft.data: the list is empty; give {path: …} entries, or one path",
            key="sft.data",
            cause=Cause.EMPTY,
        )
    parts = [_read_part(number, entry) for number, entry in enumerate(entries)]
    shares = [part.share for part in parts if part.share is not None]
    total, are_all = sum(shares), len(shares) == len(parts)
    if are_all and abs(total - 1) > 1e-6:
        raise UserError(
            f"sft.data: the shares {shares} add up to {total:g}; make that 1",
            key="sft.data",
            cause=Cause.CONFLICT,
        )
    if shares and not are_all and total >= 1:
        raise UserError(
            f"sft.data: the shares {shares} add up to {total:g}, which leaves nothing for the "
            "parts without one; lower them",
            key="sft.data",
            cause=Cause.CONFLICT,
        )
    return parts


def _read_part(number: int, entry: Any) -> MixturePart:
    place = f"sft.data.{number}"
    if isinstance(entry, MixturePart):
        return entry
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        raise UserError(
            f"{place}: must be a path or {{path, share|count|repeat}}, got {entry!r}",
            key=place,
            cause=Cause.MALFORMED,
        )
    try:
        return MixturePart.model_validate(entry)
    except ValidationError as failure:
        error = recipe_error(failure, MixturePart, origin=place)
        error.key = f"{place}.{error.key}"
        raise error from None
