"""Errors that end a command, and how their messages help the user."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a user's command, recipe or file.

    The message names the thing, its value and the remedy. The command line prints it without a
    traceback and exits with status 2; any other ValueError is a bug and keeps its traceback."""


class RunError(RuntimeError):
    """A run cannot go on for a reason outside this code; the message is the diagnosis.

    The command line prints it without a traceback and exits with status 1."""


class TrainerError(RunError):
    """A trainer rank failed or vanished; the message names it and the reason."""


class TrainerLost(TrainerError):
    """The trainer ranks cannot be used any more; new ones may continue from a checkpoint."""


def did_you_mean(name: object, known: Iterable[str], form: str = "{!r}") -> str:
    """Return `; did you mean 'math'?` where one of `known` is close to `name`, else "".

    form: how the suggestion is formatted. Names that are not close are not suggested: a wrong guess
    sends the user looking for a mistake that is not there."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"; did you mean {form.format(near[0])}?" if near else ""
