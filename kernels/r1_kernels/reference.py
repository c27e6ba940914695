"""The public functions with the same signatures, in plain PyTorch on any device.

Machines without a GPU train with them, and the Triton kernels are compared with them. Both backends
run the same chunked algorithms; fp64 autograd is the oracle of both (tests/kernels)."""

import importlib
import inspect
from functools import cache, partial, update_wrapper
from typing import Any


@cache
def __getattr__(name: str) -> Any:
    """Return the package's public function of this name, bound to plain PyTorch, or its class."""
    package = importlib.import_module("r1_kernels")
    # This function also gets dunder names: those of the package are not this module's.
    if name == "reference" or name not in package.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(package, name)
    if not inspect.isfunction(value):
        return value
    return update_wrapper(partial(value, backend="torch"), value)
