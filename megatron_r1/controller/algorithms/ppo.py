"""PPO with generalized advantage estimation (arXiv 1707.06347, eq. 7 and 11-12; GAE: arXiv
1506.02438, eq. 16; for language models: DeepSeekMath, arXiv 2402.03300, eq. 1).

    r_t = -β log(π_old / π_ref)_t, plus the response's reward on its last token
    δ_t = r_t + γ V_{t+1} - V_t,  V = 0 after the last token, also of a truncated response
    A_t = Σ_{s≥t} (γ λ)^(s-t) δ_s;  the critic's target: R_t = A_t + V_t
    J   = 1/N Σ_i 1/|o_i| Σ_t min(ρ A_t, clip(ρ, 1 - ε, 1 + ε) A_t)

With λ (`gae_lambda`) 1, R_t is the reward to go; a smaller λ relies more on the critic, and in long
chains of thought lets the reward fade before it reaches the first tokens. γ is `discount`. Averaged
per sequence. `advantage_std` batch normalizes A over the tokens of the rollout, none leaves it.
How the critic learns: section `critic`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.controller import advantages as reward_arithmetic

if TYPE_CHECKING:
    from megatron_r1.trainer.rollout_batches import RolloutBatches, TokenTargets

response_rewards = reward_arithmetic.response_rewards
"""What `token_advantages` starts from: the rewards as they are, without a baseline."""


def token_advantages(rollout: RolloutBatches, settings: TokenAdvantageSettings) -> TokenTargets:
    """Return the advantages and targets of `trainer.token_advantages.gae` with the critic's
    batch.values, per micro-batch; with `advantage_std` batch the advantages are normalized over the
    rollout."""
    from megatron_r1.trainer.rollout_batches import TokenTargets
    from megatron_r1.trainer.token_advantages import gae

    settings = TokenAdvantageSettings.of(settings)
    advantages, returns = [], []
    for microbatch in rollout.whole_microbatches:
        values = microbatch.batch.values
        assert values is not None, "the critic's values come first"
        microbatch_advantages, targets = gae(
            microbatch.token_rewards(settings.kl_beta),
            microbatch.gather(values),
            settings.discount,
            settings.gae_lambda,
            microbatch.is_response,
            microbatch.last_response_positions,
        )
        advantages.append(microbatch_advantages)
        returns.append(targets)
    if settings.advantage_std == "batch":
        advantages = rollout.normalize(advantages, settings.advantage_epsilon)
    return TokenTargets(advantages, returns)
