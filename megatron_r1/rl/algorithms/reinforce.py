"""REINFORCE (Williams, Machine Learning 8, 1992), with the rollout's mean as its baseline.

    A_i = r_i - mean(r), over all outputs of the rollout
    J   = 1/(N L) Σ_i Σ_t ρ A_i,  whose gradient at ρ = 1 is A_i ∇ log π_θ(o_i), over N L

L is a constant, max_response_tokens: an output is one action, whose log-probability is the sum of
its tokens'. One update per rollout, so that ρ is 1; with more `minibatches` ρ corrects each token,
inside clips that hardly ever hold. `advantage_std` batch divides by the rollout's deviation. The
mean holds the output's own reward, which scales the gradient by (N - 1) / N. No KL.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from megatron_r1.rl.advantages import graded, over_batch_std
from megatron_r1.rl.algorithms.grpo import LOSS

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig

__all__ = ["LOSS", "advantages"]


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Rewards less the mean of all that are graded; 0 for an ungraded output."""
    known = [reward for rewards in groups for reward in graded(rewards)]
    mean = fmean(known) if known else 0.0
    found = [[0.0 if r is None else r - mean for r in rewards] for rewards in groups]
    if rl.advantage_std == "batch":
        return over_batch_std(found, groups, rl.advantage_epsilon)
    return found
