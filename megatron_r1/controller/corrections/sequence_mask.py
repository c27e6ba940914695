"""`rl.engine_mask: sequence`: responses about which engine and trainer disagree have no policy
gradient (Liu, Li et al., "When Speed Kills Stability", 2025, richardli.xyz/rl-collapse, part 3:
rejection by the geometric mean).

    A_i,t ← A_i,t if low ≤ (Π_t k_i,t)^(1/|o_i|) ≤ high, else 0,  k = π_old / π_engine of a token

The geometric mean, e to the mean of log k, does not depend on a response's length, as their product
would. It is near 1 where k is, hence the narrow bounds, 0.999 and 1.001, those of verl. With
`rl.staleness` k has the movement of the policy, which they hardly allow. `rl.importance_cap` weighs
the tokens of what is kept.

The mean of an episode's branch is over its own sampled tokens. Masked responses stay in the
denominators, and their KL and entropy terms stay, as in `token_mask`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_r1.config.algorithms import EngineMask
    from megatron_r1.trainer.token_advantages import RolloutBatches


def within_bounds(rollout: RolloutBatches, settings: EngineMask) -> list[Tensor]:
    """Return (T,) bool per micro-batch: whether the response of a token keeps its advantage.

    Args:
        rollout: the rollout, with the log-probabilities of π_old.
        settings: the bounds of the geometric mean."""
    made = []
    for responses in rollout.responses:
        means = responses.means(responses.engine_gaps).exp()
        made.append((means >= settings.low) & (means <= settings.high))
    return made
