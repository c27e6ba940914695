"""Mixtures of supervised data: the share of each file in an epoch."""

from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from megatron_r1.config.mistakes import explain
from megatron_r1.config.section import Section


class MixturePart(Section):
    """One file of a mixture. `share`, `count` and `repeat` exclude each other; without any of them
    the file is used once (`repeat: 1`)."""

    path: str = Field(min_length=1, description="JSONL or Parquet of {prompt, response}")
    share: float | None = Field(None, gt=0, le=1)
    """share of an epoch's examples that come from this file"""
    count: int | None = Field(None, gt=0, description="how many of its examples an epoch has")
    repeat: float | None = Field(None, gt=0, description="how often an epoch has the whole file")
    columns: dict[str, str] | None = Field(None, description="{our name: the file's column}")

    @model_validator(mode="after")
    def _is_sized_once(self) -> Self:
        sizes = {name: getattr(self, name) for name in ("share", "count", "repeat")}
        given = {name: size for name, size in sizes.items() if size is not None}
        if len(given) > 1:
            raise ValueError(f"{self.path} has {given}: give one of share, count and repeat")
        return self


def read_parts(entries: list[Any]) -> list[MixturePart]:
    """Read `sft.data` given as a list.

    Raises ValueError naming the entry, the key and the nearest right one, and for an empty list or
    shares that do not add up."""
    if not entries:
        raise ValueError("sft.data: the list is empty; give {path: …} entries, or one path")
    parts = [_read_part(number, entry) for number, entry in enumerate(entries)]
    shares = [part.share for part in parts if part.share is not None]
    total, are_all = sum(shares), len(shares) == len(parts)
    if are_all and abs(total - 1) > 1e-6:
        raise ValueError(f"sft.data: the shares {shares} add up to {total:g}; make that 1")
    if shares and not are_all and total >= 1:
        raise ValueError(
            f"sft.data: the shares {shares} add up to {total:g}, which leaves nothing for the "
            "parts without one; lower them"
        )
    return parts


def _read_part(number: int, entry: Any) -> MixturePart:
    place = f"sft.data.{number}"
    if isinstance(entry, MixturePart):
        return entry
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be a path or {{path, share|count|repeat}}, got {entry!r}")
    try:
        return MixturePart.model_validate(entry)
    except ValidationError as failure:
        raise ValueError(f"{place}: {explain(failure, MixturePart)}") from None
