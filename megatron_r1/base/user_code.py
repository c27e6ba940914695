"""Reads the source of users' modules without importing them.

Imports of "module:name" are those of `r1_grading.base.user_code`."""

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
import threading
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from r1_grading.base import user_code
from r1_grading.base.user_code import find_function, find_value

from megatron_r1.base.errors import Cause, UserError

__all__ = ["find_function", "find_value", "module_source", "module_syntax", "user_location_of"]

# Stages that run at the same time are threads. Two at a time, `ast.parse` of Python 3.11 can end in
# "AST constructor recursion depth mismatch", and `find_spec` in the KeyError of an invalid cache.
_READING = threading.Lock()


def user_location_of(error: BaseException) -> str:
    """Return ` (my_env.py:60)`, the innermost line of the user's own files that an error comes
    from; "" where it comes from none."""
    (program,) = sys.modules[__name__.partition(".")[0]].__path__
    return user_code.location_of(error, program)


def module_source(function: str) -> str:
    """Return the source of the module in "module:function", without importing it.

    Raises:
        UserError: there is no such module.
    """
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
    *packages, last_name = module.split(".")
    spec = PathFinder.find_spec(last_name, [str(Path(folder, *packages))])
    return spec if spec and spec.origin else None  # a plain folder may have a package's name


def module_syntax(function: str) -> str:
    """Return the syntax tree of the module in "module:function" as text, without comments and
    layout: results of an equal module may be used again.

    Raises:
        UserError: there is no such module, or it has a syntax error.
    """
    try:
        with _READING:
            return ast.dump(ast.parse(module_source(function)))
    except SyntaxError as error:
        message = f"function {function}: {error}"
        raise UserError(message, key=function, cause=Cause.MALFORMED) from None
