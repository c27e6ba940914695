"""Calls that wait for other ranks, all at once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


def run_all(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run each call in a thread of its own; return their results, or raise the first error when all
    have ended. A single call runs in this thread."""
    if len(calls) <= 1:
        return [call() for call in calls]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    use_device = partial(torch.cuda.set_device, device) if device is not None else None
    with ThreadPoolExecutor(len(calls), initializer=use_device) as threads:
        running = [threads.submit(call) for call in calls]
    return [call.result() for call in running]
