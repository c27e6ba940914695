"""The loss of PPO's critic, and the variance that its values explain."""

import torch
from torch import Tensor

from megatron_r1.trainer.batch import PackedBatch
from megatron_r1.trainer.losses import LossTerms
from megatron_r1.trainer.metrics import Mean

EQUAL = 1e-6
"""Returns are equal up to this standard deviation, as a share of their root mean square: R = A + V
is rounded to fp32 (6e-8)."""


def value_loss(batch: PackedBatch, scores: Tensor, clip: float | None) -> LossTerms:
    """Return Σ ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²) over response tokens, with
    their number as the denominator.

    scores: (1, T) fp32, V at every position; V_old is `batch.values`, R `batch.returns`, ε `clip`,
    None for ∞. The clipped term is that of PPO's first implementation (arXiv 2005.12729, section
    3)."""
    assert batch.values is not None and batch.returns is not None, "values and returns come first"
    rows, values = batch.response_rows, scores.view(-1)
    new, old, returns = values[rows], batch.values[rows], batch.returns[rows]
    # V_old + (V - V_old) differs from V by rounding and would be counted as clipped, so without a
    # limit V itself is taken.
    near = new if clip is None else old + (new - old).clamp(-clip, clip)
    losses, clipped = (new - returns).square(), (near - returns).square()
    count = torch.tensor(len(rows), dtype=torch.int, device=values.device)
    measured = {
        "value/loss": 0.5 * torch.maximum(losses, clipped),
        "value/clip_fraction": clipped > losses,
        "value/mean": new,
        "return": returns,
        "return_squared": returns.double().square(),
        "error": returns - old,
        "error_squared": (returns - old).double().square(),
    }
    # fp64: the explained variance is a difference of mean squares and squared means.
    means = {name: Mean(x.detach().double().sum(), count) for name, x in measured.items()}
    return LossTerms(measured["value/loss"].sum(), count, means)


def explained_variance(metrics: dict[str, float]) -> float:
    """Return 1 - Var(R - V) / Var(R), and 0 for equal returns, from the moments among the metrics
    of `value_loss`, reduced over all ranks; removes these moments from `metrics`."""
    smallest = EQUAL**2 * metrics["return_squared"]
    returns, errors = (
        metrics.pop(f"{name}_squared") - metrics.pop(name) ** 2 for name in ("return", "error")
    )
    return 1 - errors / returns if returns > smallest else 0.0
