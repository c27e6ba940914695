"""Chooses CUDA_DEVICE_MAX_CONNECTIONS, the host's queues of work to a trainer rank's GPU.

With one, kernels start in the order of their calls: a collective of tensor or context ranks is then
on its way before the product that hides it (Megatron-Core 0.19.2, tensor_parallel/layers.py:621,
640 and 653; Transformer Engine 2.20.2, module/base.py:1675). The experts' exchange behind another
micro-batch needs more. Where a recipe has both, Megatron-LM's training/arguments.py allows 1 or 32,
by what is to be fast; here it is the exchange. Blackwell needs no such order. No torch."""

import warnings
from collections.abc import Mapping

from megatron_r1.config import ParallelConfig

CONNECTIONS_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = 10
"""Its compute capability's first number."""


def trainer_connections(
    parallel: ParallelConfig, environment: Mapping[str, str], architecture: int | None
) -> dict[str, str]:
    """Return what to add to a trainer rank's environment: nothing where CUDA's own will do.

    A number that the user has set stays, with a warning if the layout needs another.

    Args:
        parallel: the layout.
        environment: the user's.
        architecture: the first number of the GPU's compute capability; None without a GPU."""
    wanted_number, user_number = "", environment.get(CONNECTIONS_VARIABLE)
    if architecture is not None and parallel.overlap_expert_exchange:
        wanted_number = "32"
    elif (architecture or BLACKWELL) < BLACKWELL and max(parallel.tensor, parallel.context) > 1:
        wanted_number = "1"
    if wanted_number and user_number and user_number != wanted_number:
        warnings.warn(
            f"{CONNECTIONS_VARIABLE}={user_number}, and this layout wants {wanted_number} "
            "(docs/parallelism.md): collectives may not overlap with computation; unset it",
            stacklevel=2,
        )
    return {CONNECTIONS_VARIABLE: wanted_number} if wanted_number and not user_number else {}
