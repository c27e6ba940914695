"""Functions of the user's own, named as "module:function"."""

from __future__ import annotations

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

from megatron_r1.errors import did_you_mean


def find_function(path: str) -> Callable[..., Any]:
    """path: "module:function"; modules are also found in the folder the command was started in.

    Raises ValueError where there is no such module or function, and what the module raises while
    it is imported.
    """
    name, _, function = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a folder of a user's may be called as a package is
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # something that it imports itself
        raise ValueError(
            f"{error}: neither installed nor in {os.getcwd()}; start in the folder that has it"
        ) from None
    found = getattr(module, function, None)
    if not callable(found):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ValueError(
            f"{module.__file__} has no function {function}{did_you_mean(function, public)}"
        )
    return found


def source_of(function: str) -> str:
    """Of the module of "module:function", which is not run. Raises ValueError where there is
    none."""
    module = function.partition(":")[0]
    importlib.invalidate_caches()
    found = _below(os.getcwd(), module)  # first, as `python -m` has it, by which it is called
    if found is None:
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(module)
    if found is None or not found.origin or not found.origin.endswith(".py"):
        raise ValueError(
            f"function {function}: no Python module {module} can be found from {Path.cwd()}"
        )
    return Path(found.origin).read_text(encoding="utf-8")


def _below(folder: str, module: str) -> ModuleSpec | None:
    """A module found in `folder`, of whose packages none is imported, nor need be one: the finder
    itself takes a folder in a folder for a package's only where the outer one has been imported."""
    *packages, last = module.split(".")
    found = PathFinder.find_spec(last, [str(Path(folder, *packages))])
    return found if found and found.origin else None  # a mere folder may be called as a package is


def syntax_of(function: str) -> str:
    """What the module of "module:function" says, comments and layout aside: results of one that
    says the same may be used again. Raises ValueError as `source_of`, and for what is no Python."""
    try:
        return ast.dump(ast.parse(source_of(function)))
    except SyntaxError as error:
        raise ValueError(f"function {function}: {error}") from None
