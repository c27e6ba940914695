"""What grading shares with the programs that use it: errors, values, files, child processes."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def import_lazily(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Return `name` from its module: the body of a package's `__getattr__`.

    Args:
        package: the package's dotted name.
        homes: name → the module of `package` that has it.
        name: the attribute that is asked for.

    Raises:
        AttributeError: a name that is not in `homes`."""
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{homes[name]}"), name)
