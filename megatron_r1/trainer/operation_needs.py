"""Which of the `trainer.operations` use the model's weights, and which the optimizer's state.

Where these are offloaded between phases, the ranks bring back what an operation uses
(`trainer.offload`), and the controller refuses one that uses weights while engines compute in
their memory. Imports neither torch nor Megatron, because the controller imports it."""

from __future__ import annotations

from megatron_r1.trainer.rank_messages import LOAD, STOP

OPTIMIZER_OPERATIONS = {"update", "update_critic", "save_checkpoint", "load_checkpoint"}
"""Operations that use the optimizer's state."""
WEIGHTLESS_OPERATIONS = {
    LOAD,
    STOP,
    "free_memory",
    "measure_logprob_diff",
    "compute_token_advantages",
    "mask_advantages",
    "compare_probe",
    "checkpoint_progress",
    "verify_checkpoint",
}
"""Operations that use no weights: they may be called while the weights are offloaded
(`parallel.offload_between_phases`)."""


def needs_parameters(operation: str) -> bool:
    """Return whether an operation uses the model's weights; all do that are not known to go
    without."""
    return operation not in WEIGHTLESS_OPERATIONS


def needs_optimizer(operation: str) -> bool:
    """Return whether an operation uses the optimizer's state."""
    return operation in OPTIMIZER_OPERATIONS
