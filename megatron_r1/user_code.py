"""Functions of the user's own, named as "module:function"."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_r1.suggestion import did_you_mean


def find_function(path: str) -> Callable[..., Any]:
    """path: "module:function"; modules are also found in the folder the command was started in.

    Raises ValueError where there is no such module or function, and what the module raises while
    it is imported.
    """
    name, _, function = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
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
