"""The loss of PPO's critic, and the share of the returns' variance that its values explain."""

import torch
from torch import Tensor

from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.losses import LossSum
from megatron_r1.trainer.metrics import Mean

EQUAL_RETURNS = 1e-6
"""Returns count as equal up to this standard deviation, divided by their root mean square: the
rounding of R = A + V to fp32 is 6e-8."""


def value_loss(batch: PackedMicrobatch, scores: Tensor, clip: float | None) -> LossSum:
    """Return the clipped squared error of values, summed over response tokens.

    Σ ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²), with their number as the denominator.
    V_old is `batch.values`, R `batch.returns`, ε `clip`. The clipped term is that of PPO's first
    implementation (arXiv 2005.12729, section 3).

    Args:
        batch: the micro-batch, with `values` and `returns`.
        scores: (1, T) fp32, V at every position.
        clip: ε; None for ∞."""
    assert batch.values is not None and batch.returns is not None, "values and returns come first"
    rows, values = batch.response_positions, scores.view(-1)
    new_values, old_values, returns = values[rows], batch.values[rows], batch.returns[rows]
    # V_old + (V - V_old) differs from V by rounding and would be counted as clipped, so without a
    # limit V itself is taken.
    clipped_values = (
        new_values if clip is None else old_values + (new_values - old_values).clamp(-clip, clip)
    )
    losses, clipped_losses = (new_values - returns).square(), (clipped_values - returns).square()
    count = torch.full((), len(rows), dtype=torch.int, device=values.device)
    token_values = {
        "value/loss": 0.5 * torch.maximum(losses, clipped_losses),
        "value/clip_fraction": clipped_losses > losses,
        "value/mean": new_values,
        "return": returns,
        "return_squared": returns.double().square(),
        "error": returns - old_values,
        "error_squared": (returns - old_values).double().square(),
    }
    # fp64: the explained variance is a difference of mean squares and squared means.
    means = {name: Mean(x.detach().double().sum(), count) for name, x in token_values.items()}
    return LossSum(token_values["value/loss"].sum(), count, means)


def explained_variance(metrics: dict[str, float]) -> float:
    """Return 1 - Var(R - V) / Var(R), and 0 for equal returns.

    Args:
        metrics: the metrics of the value loss, reduced over all ranks; the moments among them are
            removed."""
    min_returns = EQUAL_RETURNS**2 * metrics["return_squared"]
    returns, errors = (
        metrics.pop(f"{name}_squared") - metrics.pop(name) ** 2 for name in ("return", "error")
    )
    return 1 - errors / returns if returns > min_returns else 0.0
