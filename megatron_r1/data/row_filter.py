"""The conditions of `data.where`, by which rows of a data source are kept.

A condition is a value, a list of values, or a mapping of `min`, `max`, `not`, `or`; a list holds if
any of its values does. For a column that is a list, a condition holds if it does for any entry."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.data.data_report import DataReport
from megatron_r1.data.rows import ABSENT_VALUE, CanonicalRow, lookup_column

CONDITION_KEYS = ("min", "max", "not", "or")
TRUE_WORDS, FALSE_WORDS = ("true", "yes"), ("false", "no")
MAX_UNSEEN = 1_000
"""Rows after which a column that none had is refused."""
Conditions = Mapping[str, Any]


def _check_conditions(conditions: Conditions, key: str = "data.where") -> None:
    """Check the conditions on rows before any row is read.

    Raises:
        UserError: a condition with an unknown key, a limit that is not a number, or no limit."""
    for column, condition in conditions.items():
        if not isinstance(condition, Mapping):
            continue
        place = f"{key}.{column}"
        for name in condition:
            if name not in CONDITION_KEYS:
                suggestion = did_you_mean(str(name), CONDITION_KEYS, "{}")
                raise UserError(
                    f"{place}: {name!r} is not one of {', '.join(CONDITION_KEYS)}{suggestion}; "
                    f"nested columns are written {column}.{name}",
                    key=place,
                    cause=Cause.UNKNOWN,
                )
        for name in ("min", "max"):
            if name in condition and _as_number(condition[name]) is None:
                raise UserError(
                    f"{place}.{name}: {condition[name]!r} is no number",
                    key=f"{place}.{name}",
                    cause=Cause.MALFORMED,
                )
        if not condition.keys() - {"or"}:
            raise UserError(
                f"{place}: give min, max or not; or, for values that are enough, a list",
                key=place,
                cause=Cause.EMPTY,
            )


class RowFilter:
    """Keeps the rows of one source that meet all conditions, and counts the others in `report`.

    Args:
        conditions: column → condition.
        report: counts the rows.
        key: the setting, for errors.

    Raises:
        UserError: an invalid condition."""

    def __init__(self, conditions: Conditions, report: DataReport, key: str = "data.where") -> None:
        _check_conditions(conditions, key)
        self._where, self._report, self._key = conditions, report, key
        self._unseen, self._columns = set(conditions), dict[str, None]()

    def keeps(self, location: str, row: CanonicalRow) -> bool:
        """Return whether a row, with the columns of the file, meets all conditions. A column that
        it lacks is null."""
        self._report.num_read += 1
        if self._unseen:
            self._columns |= dict.fromkeys(row)
            self._unseen = {
                name for name in self._unseen if lookup_column(row, name) is ABSENT_VALUE
            }
            if self._report.num_read >= MAX_UNSEEN:
                self.finish()
        for column, condition in self._where.items():
            value = lookup_column(row, column)
            if not meets_condition(None if value is ABSENT_VALUE else value, condition):
                key = f"{self._key}.{column}"
                self._report.skip_row(f"{key}: {condition}", location, key)
                return False
        return True

    def finish(self) -> None:
        """Raise UserError for a column that no row had."""
        for column in sorted(self._unseen) if self._columns else ():
            suggestion = did_you_mean(column, self._columns, "{}")
            raise UserError(
                f"{self._key}.{column}: {self._report.source} has no such column{suggestion}; it "
                f"has {', '.join(self._columns)}",
                key=f"{self._key}.{column}",
                cause=Cause.NOT_FOUND,
            )


def meets_condition(value: Any, condition: Any) -> bool:
    """Return whether a column's value meets a condition. Numbers may be text; what is no number,
    such as null or "n/a", is within no limits."""
    values = value if isinstance(value, list) else [value]
    if not isinstance(condition, Mapping):
        return any(_equals_any(entry, condition) for entry in values)
    if "or" in condition and any(_equals_any(entry, condition["or"]) for entry in values):
        return True
    if "not" in condition and any(_equals_any(entry, condition["not"]) for entry in values):
        return False
    if condition.keys() <= {"not", "or"}:
        return True
    return any(_is_within(entry, condition) for entry in values)


def _as_number(value: Any) -> float | None:
    """Return a number, also one in text; None for NaN and anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _is_within(value: Any, limits: Mapping[str, Any]) -> bool:
    number = _as_number(value)
    if number is None:
        return False
    minimum, maximum = _as_number(limits.get("min")), _as_number(limits.get("max"))
    return (minimum is None or number >= minimum) and (maximum is None or number <= maximum)


def _equals_any(value: Any, condition_value: Any) -> bool:
    return any(
        _equals_value(value, w)
        for w in (condition_value if isinstance(condition_value, list) else [condition_value])
    )


def _equals_value(value: Any, condition_value: Any) -> bool:
    """Return whether two values are equal, `0.50` and "0.5", true and "Yes" too."""
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None or condition_value is None:
        return value is condition_value
    for first, second in ((value, condition_value), (condition_value, value)):
        if isinstance(first, bool) and isinstance(second, str):
            return second.strip().casefold() in (TRUE_WORDS if first else FALSE_WORDS)
    if isinstance(value, str) and isinstance(condition_value, str):
        return value.strip() == condition_value.strip()
    left, right = _as_number(value), _as_number(condition_value)
    return value == condition_value if left is None or right is None else left == right
