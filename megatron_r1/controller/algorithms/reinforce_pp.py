"""REINFORCE++ (arXiv 2501.03262, section 3).

    A_i,t = r_i - β Σ_{s≥t} log(π_old / π_ref)_s
    A     ← (A - mean(A)) / std(A), over every response token of the rollout, on all ranks
    J     = 1/Σ_i |o_i| Σ_i Σ_t min(ρ A_i,t, clip(ρ, 1 - ε, 1 + ε) A_i,t)

PPO without a critic: the reward is on the last token, a KL penalty on each, and the whole rollout
gives baseline and scale, so that one response per prompt is enough (`group_size` 1). Averaged per
token. `discount` weighs later tokens. Clip and β are those usual with PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.controller import advantages as reward_arithmetic

if TYPE_CHECKING:
    from megatron_r1.trainer.rollout_batches import RolloutBatches, TokenTargets

response_rewards = reward_arithmetic.response_rewards
"""What `token_advantages` starts from: the rewards as they are, without a baseline."""


def token_advantages(rollout: RolloutBatches, settings: TokenAdvantageSettings) -> TokenTargets:
    """Return A_t, shifted and scaled to mean 0 and deviation 1 over the response tokens of the
    rollout. Before that, A_t = Σ_{s≥t} γ^(s-t) (-β log(π_old / π_ref)_s) + γ^(T-t) r, T the last
    token; it is 0 outside responses."""
    from megatron_r1.trainer.rollout_batches import TokenTargets, reward_to_go

    settings = TokenAdvantageSettings.of(settings)
    advantages = reward_to_go(rollout, settings)
    return TokenTargets(rollout.normalize(advantages, settings.advantage_epsilon))
