"""`rl.schedule`: settings that change with the step."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from r1_grading.base.values import read_field

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.yaml_text import nest_keys


class ScheduleEntry(BaseModel):
    """Settings from a step on: `{from_step: 513, rollout.max_response_tokens: 65536}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    from_step: int = Field(gt=0)
    """first step with these settings"""

    @field_validator("from_step", mode="before")
    @classmethod
    def _read_field_value(cls, value: Any, info: ValidationInfo) -> Any:
        return read_field(cls, value, info)

    @model_validator(mode="before")
    @classmethod
    def _names_its_first_step(cls, values: Any) -> Any:
        # Other keys are settings, so pydantic alone would take a misspelt one for a setting.
        for key in values if isinstance(values, dict) and "from_step" not in values else ():
            if suggestion := did_you_mean(key, ["from_step"], "{}"):
                raise UserError(f"unknown key {key}{suggestion}", key=key, cause=Cause.UNKNOWN)
        return values

    @model_validator(mode="after")
    def _changes_something(self) -> "ScheduleEntry":
        if not self.changes:
            raise UserError(
                f"rl.schedule: from_step: {self.from_step} changes nothing; add settings such as "
                "rollout.max_response_tokens: 65536",
                key="rl.schedule",
                cause=Cause.EMPTY,
            )
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The settings, as `{"section.key": value}`."""
        return self.model_extra or {}


def changes_at(schedule: list[ScheduleEntry], step: int) -> dict[str, dict[str, Any]]:
    """Return what differs at `step`, as sections of a recipe; later entries take precedence."""
    changes: dict[str, Any] = {}
    for entry in schedule:
        if entry.from_step <= step:
            changes |= entry.changes
    return nest_keys(changes)


def digest_until(schedule: list[ScheduleEntry], step: int) -> str:
    """Return 16 hexadecimal digits that differ where the entries up to `step` do; "" without any.

    Samples depend on all of them: earlier ones have shaped the policy."""
    entries = [entry.model_dump() for entry in schedule if entry.from_step <= step]
    text = json.dumps(entries, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if entries else ""


def check_schedule_keys(
    schedule: list[ScheduleEntry], scheduled_keys: Collection[str], known_keys: Collection[str]
) -> None:
    """Refuse settings of a schedule that cannot change during a run.

    Args:
        schedule: the entries.
        scheduled_keys: the keys that can.
        known_keys: all keys of a recipe, which are not misspelt.

    Raises:
        UserError: for a setting that cannot change."""
    for key in (key for entry in schedule for key in entry.changes):
        if key not in scheduled_keys:
            suggestion = "" if key in known_keys else did_you_mean(key, scheduled_keys, "{}")
            suggestion = suggestion or f"; these can: {', '.join(scheduled_keys)}"
            raise UserError(
                f"rl.schedule: {key} cannot change during a run{suggestion}",
                key="rl.schedule",
                cause=Cause.UNSUPPORTED,
            )


def check_schedule_order(schedule: list[ScheduleEntry]) -> list[ScheduleEntry]:
    """Return the schedule; UserError unless its steps increase."""
    steps = [entry.from_step for entry in schedule]
    if sorted(set(steps)) != steps:
        raise UserError(
            f"rl.schedule: from_step must increase from entry to entry, not {steps}",
            key="rl.schedule",
            cause=Cause.CONFLICT,
        )
    return schedule
