"""Settings by their dotted keys, and what differs between two sets of them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

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
