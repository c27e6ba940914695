"""The body of a request, read field by field: what no code names is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.agents.gateway.request import RequestError

NO_DEFAULT: Any = object()
SAMPLING = {
    "temperature": None,
    "top_p": None,
    "top_k": -1,
    "min_p": 0,
    "seed": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
}
"""Sampling options of OpenAI and vLLM, and for each the value that changes nothing."""


class Body:
    """A request's JSON object, read field by field; `finish` refuses unread fields.

    So an option is ignored only where the code names it. null counts as absent: in replies some
    fields are null, and clients send replies back as messages."""

    def __init__(self, value: object, path: str = "") -> None:
        """Take an object of the request.

        Args:
            value: the object.
            path: the path of this object in the request, for errors."""
        if not isinstance(value, Mapping):
            raise RequestError(f"must be an object, got {_short_repr(value)}", path or None)
        self._fields_left = {name: entry for name, entry in value.items() if entry is not None}
        self._path = path

    def path(self, name: str) -> str:
        """Return the path of a field, `messages.0.role`."""
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = NO_DEFAULT) -> Any:
        """Return a field of one of `kinds`.

        Args:
            name: the field.
            kinds: the Python types that its JSON value may have.
            default: returned where the field is absent; by default it must be there.

        Raises:
            RequestError: the field has another type, or is absent and there is no default.
        """
        if name not in self._fields_left:
            if default is NO_DEFAULT:
                raise RequestError("is required", self.path(name))
            return default
        value = self._fields_left.pop(name)
        is_bool = isinstance(value, bool)  # an int too in Python, but not in JSON
        allowed_kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, kinds) or (is_bool and bool not in allowed_kinds):
            names = " or ".join(kind.__name__ for kind in allowed_kinds)
            raise RequestError(f"must be {names}, got {_short_repr(value)}", self.path(name))
        return value

    def take_objects(self, name: str, default: Any = NO_DEFAULT) -> list[Body]:
        """Return a field that is a list of objects.

        Raises:
            RequestError: as `take`, or an item is not an object.
        """
        values, path = self.take(name, list, default), self.path(name)
        return [Body(value, f"{path}.{i}") for i, value in enumerate(values)]

    def take_positive(self, name: str) -> int | None:
        """Return a positive integer, or None where it is absent.

        Raises:
            RequestError: it is no integer, or below 1.
        """
        value = self.take(name, int, None)
        if value is not None and value < 1:
            raise RequestError(f"must be at least 1, got {value}", self.path(name))
        return value

    def take_choice(self, name: str, values: tuple[Any, ...], default: Any) -> Any:
        """Return a field that must be one of `values`.

        Args:
            name: the field.
            values: the values that are supported.
            default: the value of an absent field; None where it must be there.

        Raises:
            RequestError: any other value.
        """
        value = self._fields_left.pop(name, default)
        if value not in values:
            texts = " or ".join(map(_short_repr, values))
            raise RequestError(
                f"{_short_repr(value)} is not supported; use {texts}", self.path(name)
            )
        return value

    def take_fixed(self, **values: Any) -> None:
        """Take fields that support a single value, which is also their default."""
        for name, value in values.items():
            self.take_choice(name, (value,), value)

    def ignore(self, *names: str) -> None:
        """Drop fields that change neither prompt nor sampling."""
        for name in names:
            self._fields_left.pop(name, None)

    def options(self, neutral: Mapping[str, object]) -> dict[str, object]:
        """Return the sampling options whose value changes something.

        Args:
            neutral: the options, each with the value that changes nothing; None where every value
                changes something."""
        options = {
            name: self._fields_left.pop(name) for name in neutral if name in self._fields_left
        }
        return {name: value for name, value in options.items() if value != neutral[name]}

    def finish(self) -> None:
        """Raise RequestError for a field that was not taken."""
        for name, value in self._fields_left.items():
            raise RequestError(
                f"this gateway does not support it (got {_short_repr(value)}); leave it out",
                self.path(name),
            )


def content_text(value: Any, path: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """Return a message's content, a text or a list of text parts, as one text.

    Args:
        value: the content in the request.
        path: its path in the request, for errors.
        kinds: the types of parts that are text.

    Raises:
        RequestError: it is neither, or has a part of another kind.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise RequestError(f"must be a text or a list of parts, got {_short_repr(value)}", path)
    return "".join(_part_text(part, f"{path}.{index}", kinds) for index, part in enumerate(value))


def _part_text(value: Any, path: str, kinds: tuple[str, ...]) -> str:
    body = Body(value, path)
    kind = body.take("type", str)
    if kind not in kinds:
        raise RequestError(
            f"parts of type {kind} are not supported; use {kinds[0]}", body.path("type")
        )
    # Hints on caching, and what clients send back with the parts of a reply.
    body.ignore("cache_control", "citations", "annotations", "logprobs")
    text = body.take("text", str)
    body.finish()
    return text


def stop_strings(value: Any, path: str) -> tuple[str, ...]:
    """Return the stop strings of a field that is one or a list of them.

    Raises:
        RequestError: it is neither, or has an empty string.
    """
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise RequestError(f"must be a text or a list of texts, got {_short_repr(value)}", path)
    return tuple(strings)


def _short_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
