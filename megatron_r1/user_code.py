"""Users' own functions and other values, named as "module:name"."""

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from megatron_r1.errors import Cause, UserError, did_you_mean

# Stages that run at the same time are threads. Two at a time, `ast.parse` of Python 3.11 can end in
# "AST constructor recursion depth mismatch", and `find_spec` in the KeyError of an invalid cache.
_READING = threading.Lock()
_LIBRARIES = (str(Path(__file__).parent), *sysconfig.get_paths().values(), "<")
"""The beginnings of the names of files that are not the user's."""


def find_function(path: str) -> Callable[..., Any]:
    """Import and return "module:function"; raises as `find`."""
    return find(path, "function", callable)


def find(path: str, kind: str, is_one: Callable[[Any], bool]) -> Any:
    """Import and return "module:name"; modules are also found in the working folder.

    kind: what it must be, in errors. Raises UserError for an unknown module, and where `is_one` is
    false of the value or there is none; raises what the module raises at its import."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a user's folder may have the name of a package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        raise UserError(
            f"{error}: neither installed nor in {os.getcwd()}; start in the folder that has it",
            key=path,
            cause=Cause.NOT_FOUND,
        ) from None
    value = getattr(module, name, None)
    if not is_one(value):
        known = [key for key, other in vars(module).items() if key[:1] != "_" and is_one(other)]
        raise UserError(
            f"{module.__file__} has no {kind} {name}{did_you_mean(name, known)}",
            key=path,
            cause=Cause.NOT_FOUND,
        )
    return value


def place_of(error: BaseException) -> str:
    """Return ` (my_env.py:60)`, the innermost line of the user's own files that an error comes
    from; "" where it comes from none."""
    places = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "<string>", error.lineno or 1))
    for name, line in reversed(places):
        if not name.startswith(_LIBRARIES):
            path = Path(name)
            here = Path.cwd()
            return f" ({path.relative_to(here) if path.is_relative_to(here) else path}:{line})"
    return ""


def source_of(function: str) -> str:
    """Return the source of the module in "module:function", without importing it. Raises UserError
    if there is no such module."""
    module = function.partition(":")[0]
    importlib.invalidate_caches()
    spec = _find_below(os.getcwd(), module)  # first, as with `python -m`, which runs it
    if spec is None:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise UserError(
            f"function {function}: no Python module {module} can be found from {Path.cwd()}",
            key=function,
            cause=Cause.NOT_FOUND,
        )
    return Path(spec.origin).read_text(encoding="utf-8")


def _find_below(folder: str, module: str) -> ModuleSpec | None:
    """Find a module in `folder` without importing its parent packages, which may be plain folders:
    `find_spec` with the dotted name would import them."""
    *packages, last = module.split(".")
    spec = PathFinder.find_spec(last, [str(Path(folder, *packages))])
    return spec if spec and spec.origin else None  # a plain folder may have a package's name


def syntax_of(function: str) -> str:
    """Return the syntax tree of the module in "module:function" as text, without comments and
    layout: results of an equal module may be used again. Raises UserError as `source_of` and for a
    syntax error."""
    try:
        with _READING:
            return ast.dump(ast.parse(source_of(function)))
    except SyntaxError as error:
        message = f"function {function}: {error}"
        raise UserError(message, key=function, cause=Cause.MALFORMED) from None
