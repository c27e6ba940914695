"""What grading shares with the programs that use it: errors, values, files, child processes."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def import_lazily(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Return `name` from the module of `package` in `homes`: the body of a package's `__getattr__`.

    Raises AttributeError for a name that is not in `homes`."""
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{homes[name]}"), name)
