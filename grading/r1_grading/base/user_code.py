"""Imports users' own functions and values, named as "module:name", and places their errors."""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1_grading.base.errors import FORMER_PACKAGE, Cause, UserError, did_you_mean

_LIBRARIES = (str(Path(__file__).parents[1]), *sysconfig.get_paths().values(), "<")
"""The beginnings of the names of files that are not the user's."""


def find_function(path: str) -> Callable[..., Any]:
    """Import and return "module:function".

    Raises:
        UserError: as `find_value`, or the value cannot be called.
        Exception: what the module raises at its import.
    """
    return find_value(path, "function", callable)


def find_value(path: str, kind: str, is_one: Callable[[Any], bool]) -> Any:
    """Import and return "module:name"; modules are also found in the working folder.

    Args:
        path: "module:name".
        kind: what the value must be, in errors.
        is_one: whether a value is of the kind.

    Raises:
        UserError: the module is unknown, it has no such name, or `is_one` refuses the value.
        Exception: what the module raises at its import."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a user's folder may have the name of a package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{error.name}.".startswith(f"{FORMER_PACKAGE}."):
            raise UserError(
                f"{FORMER_PACKAGE} is the package r1_grading now: from r1_grading import Grade",
                key=path,
                cause=Cause.NOT_FOUND,
            ) from None
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        hint = (
            "; modules were renamed in 0.3.0: CHANGELOG_RENAMES.md has the old and the new names"
            if module_name.startswith("megatron_r1.")
            else f": neither installed nor in {os.getcwd()}; start in the folder that has it"
        )
        raise UserError(
            f"{error}{hint}",
            key=path,
            cause=Cause.NOT_FOUND,
        ) from None
    value = getattr(module, name, None)
    if not is_one(value):
        names = [key for key, entry in vars(module).items() if key[:1] != "_" and is_one(entry)]
        raise UserError(
            f"{module.__file__} has no {kind} {name}{did_you_mean(name, names)}",
            key=path,
            cause=Cause.NOT_FOUND,
        )
    return value


def location_of(error: BaseException, program: str | None = None) -> str:
    """Return ` (my_env.py:60)`, the innermost line of the user's own files in an error.

    "" where the error comes from none.

    Args:
        error: the error with its traceback.
        program: a folder whose files are not the user's either."""
    places = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "<string>", error.lineno or 1))
    for name, line in reversed(places):
        if not name.startswith(_LIBRARIES if program is None else (program, *_LIBRARIES)):
            path = Path(name)
            folder = Path.cwd()
            return f" ({path.relative_to(folder) if path.is_relative_to(folder) else path}:{line})"
    return ""
