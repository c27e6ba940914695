"""RLOO: REINFORCE with the prompt's other responses as baseline (Back to Basics, arXiv 2402.14740,
section 3; Kool et al. 2019).

    A_i,t = r_i - 1/(G - 1) Σ_{j≠i} r_j - β Σ_{s≥t} log(π_old / π_ref)_s
    J     = 1/(N L) Σ_i Σ_t ρ A_i,t,  L a constant: max_response_tokens

A response is one action, so tokens are summed, not averaged. The source has the KL penalty of the
whole response in its reward, whose expected gradient is that of KL(π_θ ‖ π_ref). Here a token's
advantage leaves out the penalties before it, which it cannot change, and the baseline of the
penalty: less variance, the same expectation. Each token's own penalty alone would be the k2 loss
(log(π_θ / π_ref)² / 2), which has that gradient but for the token's effect on later ones.
One update per rollout keeps ρ at 1; see `reinforce`. β and G are the source's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from r1_grading.terms import rewards_equal

from megatron_r1.controller.advantages import drop_ungraded

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig
    from megatron_r1.config.loss_settings import TokenAdvantageSettings
    from megatron_r1.trainer.rollout_batches import RolloutBatches, TokenTargets


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Return r_i - 1/(G - 1) Σ_{j≠i} r_j, over the group's graded responses. It is 0 for a group
    whose graded rewards are equal or fewer than two, and NaN for an ungraded response."""
    return [_leave_one_out(rewards) for rewards in groups]


def token_advantages(rollout: RolloutBatches, settings: TokenAdvantageSettings) -> TokenTargets:
    """Return A_t: the response's advantage less the penalties to come, β log(π_old / π_ref)_s for
    s≥t; 0 outside responses."""
    from megatron_r1.trainer.rollout_batches import TokenTargets, reward_to_go

    return TokenTargets(reward_to_go(rollout, settings))


def _leave_one_out(rewards: list[float | None]) -> list[float]:
    graded_rewards = drop_ungraded(rewards)
    if rewards_equal(graded_rewards):
        return [math.nan if r is None else 0.0 for r in rewards]
    total, num_others = sum(graded_rewards), len(graded_rewards) - 1
    return [math.nan if r is None else r - (total - r) / num_others for r in rewards]
