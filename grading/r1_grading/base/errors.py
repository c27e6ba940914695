"""Errors that end a command, and the texts of their messages."""

import difflib
import functools
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

FORMER_PACKAGE = "megatron_r1.rewards"
"""The name of this package until 0.3.0, which recipes and users' modules may still have."""


class Cause(StrEnum):
    """What is wrong with the thing that a `UserError` names."""

    UNKNOWN = "unknown"
    """It is not one of the known names."""
    MISSING = "missing"
    """It must be given, and is not."""
    NOT_FOUND = "not_found"
    """No file, folder, address or object has that name."""
    UNREADABLE = "unreadable"
    """The system does not let this process read or write it."""
    MALFORMED = "malformed"
    """Its type or its syntax is wrong."""
    OUT_OF_RANGE = "out_of_range"
    """The value is too small or too large by itself."""
    TOO_LARGE = "too_large"
    """It does not fit: memory, disk, context length, number of processes."""
    INDIVISIBLE = "indivisible"
    """One size must be a multiple of another, and is not."""
    CONFLICT = "conflict"
    """It contradicts another setting, file or option."""
    CHANGED = "changed"
    """It differs from what the run, checkpoint or output was made with."""
    DUPLICATE = "duplicate"
    """It is given more than once."""
    EXISTS = "exists"
    """It would overwrite what is there."""
    BUSY = "busy"
    """Another process uses it."""
    EMPTY = "empty"
    """Nothing of it can be used."""
    UNSUPPORTED = "unsupported"
    """It is valid, and not implemented here."""
    NOT_INSTALLED = "not_installed"
    """A package or program is missing."""
    FAILED = "failed"
    """The user's own code, or a program that it names, failed."""


class UserError(ValueError):
    """A mistake in a user's command, recipe or file.

    The message names the thing, its value and the remedy. The command line prints it without a
    traceback and exits with status 2; any other ValueError is a bug and keeps its traceback.
    Programs and tests go by key and cause; the wording may change.

    Args:
        message: the text for the user.
        key: the thing at fault, in the user's terms: a recipe key (`rl.group_size`), an option
            (`--json`), a file's role (`questions`), a field of a row (`truth`).
        cause: what is wrong with it."""

    def __init__(self, message: str, *, key: str, cause: Cause) -> None:
        super().__init__(message)
        self.key = key
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        constructor = functools.partial(type(self), key=self.key, cause=self.cause)
        return constructor, self.args


class RunError(RuntimeError):
    """A run cannot go on for a reason outside this code; the message is the diagnosis.

    The command line prints it without a traceback and exits with status 1."""


def did_you_mean(name: object, names: Iterable[str], form: str = "{!r}") -> str:
    """Return `; did you mean 'math'?` where one of `names` is close to `name`, else "".

    Names that are not close are not suggested: a wrong guess sends the user looking for a mistake
    that is not there.

    Args:
        name: what the user wrote.
        names: the names that exist.
        form: how the suggestion is formatted."""
    matches = difflib.get_close_matches(str(name).lower(), list(names), n=1)
    return f"; did you mean {form.format(matches[0])}?" if matches else ""


def shorten(text: object, max_chars: int = 80) -> str:
    """Return `text` as one line of at most `max_chars` characters, cut with an ellipsis."""
    try:
        text = str(text)
    except ValueError:  # an integer of more than 4,300 digits, or a list with one
        text = f"a {type(text).__name__} with more than 4,300 digits"
    # Cut before splitting: the text may be megabytes of model output.
    line = " ".join(text[: max_chars + 1].split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"
