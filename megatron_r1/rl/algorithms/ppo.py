"""PPO with generalized advantage estimation (arXiv 1707.06347, eq. 7 and 11-12; GAE: arXiv
1506.02438, eq. 16; for language models as DeepSeekMath, arXiv 2402.03300, eq. 1, has it).

    r_t = -β log(π_old / π_ref)_t, and with the last token the output's reward
    δ_t = r_t + γ V_{t+1} - V_t,  V = 0 after the last token, that of a cut-off output too
    A_t = Σ_{s≥t} (γ λ)^(s-t) δ_s;  the critic's target: R_t = A_t + V_t
    J   = 1/N Σ_i 1/|o_i| Σ_t min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)

λ (`gae_lambda`) 1 makes R_t the reward to go itself; less of it trusts the critic more, and in long
chains of thought lets the reward fade before it reaches their beginning. γ is `discount`.
`advantage_std` batch then normalises A over the rollout's tokens, none leaves it. Where nobody
could grade, A is 0 and the target the value itself. How the critic learns: section `critic`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_r1.rl.advantages import ungraded_as_nan
from megatron_r1.rl.algorithms.grpo import LOSS

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig
    from megatron_r1.training.token_advantages import Scored

__all__ = [
    "LOSS",
    "TOKEN_ADVANTAGES",
    "advantages",
    "token_advantages",
]

TOKEN_ADVANTAGES = "megatron_r1.rl.algorithms.ppo:token_advantages"


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """The rewards; the trainer makes advantages of them."""
    return ungraded_as_nan(groups)


def token_advantages(scored: Scored, settings: dict[str, Any]) -> None:
    """Advantages, and the critic's targets, as batch.returns, from batch.values."""
    from megatron_r1.training.token_advantages import penalised_rewards

    discount = settings["discount"]
    for responses in scored.responses:
        values = responses.whole(responses.batch.values)
        rewards = penalised_rewards(responses, settings["kl_beta"])
        deltas = rewards + discount * responses.following(values) - values
        advantages = responses.discounted_sums(deltas, discount * settings["gae_lambda"])
        responses.keep(advantages)
        responses.batch.returns = responses.batch.advantages + responses.own(values)
    if settings["advantage_std"] == "batch":
        scored.normalise(settings["advantage_epsilon"])
