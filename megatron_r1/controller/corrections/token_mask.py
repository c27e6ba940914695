"""`rl.engine_mask: token`: tokens about which engine and trainer disagree have no policy gradient
(IcePop: Ring-1T, arXiv 2510.18855; INTELLECT-3, arXiv 2512.16144, eq. 1).

    A_t ← A_t if low ≤ k_t ≤ high, else 0,  k_t = π_old(o_t) / π_engine(o_t)

π_old is the trainer's policy before the step's updates, so that k compares two computations of the
same weights, or with `rl.staleness` also of older ones. The sources' bounds are 0.5 and 5. They
also weigh the tokens that are kept by k: set `rl.importance_cap` to `high`.

A masked token stays in the denominators: with much masked, a step is small, and not as large as if
little had been. Its KL and entropy terms stay, which no engine's probability enters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_r1.config.algorithms import EngineMask
    from megatron_r1.trainer.token_advantages import RolloutBatches


def within_bounds(rollout: RolloutBatches, settings: EngineMask) -> list[Tensor]:
    """Return (T,) bool per micro-batch: whether a token keeps its advantage.

    Args:
        rollout: the rollout, with the log-probabilities of π_old.
        settings: the bounds of k."""
    made = []
    for responses in rollout.responses:
        ratios = responses.engine_gaps.exp()
        made.append((ratios >= settings.low) & (ratios <= settings.high))
    return made
