"""One row of a table: an implementation, and the reasons why it may not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], dict[str, torch.Tensor]]
OURS = "r1_kernels"
TOO_LATE = "the time given was used up: raise --minutes, or use --only"


@dataclass(frozen=True)
class Implementation:
    """make(inputs) imports what it needs, does what is not timed, and returns the timed call.

    The call returns its results by the names that the inputs' `errors` compares. computes: what it
    does more or less than ours, in words. overwrites: its inputs are restored after each call.
    """

    name: str
    make: Callable[[Any], Call]
    computes: str = ""
    gpu_only: bool = False
    overwrites: bool = False


def why(error: BaseException) -> str:
    """Return the reason of a failure, in one line of the table."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "ALLOC_FAILED" in text:
        return "out of memory"
    if "out of memory" in text or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"needs the Python package {error.name}: see requirements/bench.txt"
    return f"{type(error).__name__}: {text[:110]}"
