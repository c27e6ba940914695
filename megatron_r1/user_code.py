"""Users' own functions, named as "module:function"."""

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from megatron_r1.errors import UserError, did_you_mean


def find_function(path: str) -> Callable[..., Any]:
    """Import and return "module:function"; modules are also found in the working folder.

    Raises UserError for an unknown module or function, and what the module raises at its import."""
    name, _, function = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a user's folder may have the name of a package
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        raise UserError(
            f"{error}: neither installed nor in {os.getcwd()}; start in the folder that has it"
        ) from None
    value = getattr(module, function, None)
    if not callable(value):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(
            f"{module.__file__} has no function {function}{did_you_mean(function, public)}"
        )
    return value


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
            f"function {function}: no Python module {module} can be found from {Path.cwd()}"
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
        return ast.dump(ast.parse(source_of(function)))
    except SyntaxError as error:
        raise UserError(f"function {function}: {error}") from None
