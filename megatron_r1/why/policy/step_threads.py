"""Chooses the threads of torch for the models of a step by what its passes compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_r1.base.errors import UserError
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.step_models import StepModels

MAX_SINGLE_THREAD_FLOPS = 2.0**32
"""Floating-point operations of a pass over a step's tokens, a fraction of a second of one core, up
to which threads wait for each other longer than they compute."""


@contextlib.contextmanager
def threads_for(models: StepModels) -> Iterator[None]:
    """Compute in the block with one thread where a step is small.

    Args:
        models: the step's models and rows."""
    num_threads, is_small = torch.get_num_threads(), False
    with contextlib.suppress(CannotRecompute, UserError):  # the checks say why not
        is_small = models.pass_flops <= MAX_SINGLE_THREAD_FLOPS
    try:
        if is_small:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(num_threads)
