"""REINFORCE++ (arXiv 2501.03262, section 3).

    A_i,t = r_i - β Σ_{s≥t} log(π_old / π_ref)_s
    A     ← (A - mean(A)) / std(A), over every response token of the rollout, on all ranks
    J     = 1/Σ_i |o_i| Σ_i Σ_t min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)

PPO without a critic: the reward comes with the last token, a KL penalty with each, and the
baseline and the scale are the whole rollout's, so that one output per question is enough
(`group_size` 1). `discount` weighs what is to come. Ungraded outputs have advantage 0 and count in
neither mean nor deviation. Clip and β are those usual with PPO.
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

TOKEN_ADVANTAGES = "megatron_r1.rl.algorithms.reinforce_pp:token_advantages"


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """The rewards; the trainer makes advantages of them."""
    return ungraded_as_nan(groups)


def token_advantages(scored: Scored, settings: dict[str, Any]) -> None:
    from megatron_r1.training.token_advantages import reward_to_go

    reward_to_go(scored, settings)
    scored.normalise(settings["advantage_epsilon"])
