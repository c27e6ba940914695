"""On-policy distillation: the student samples, the teacher computes log-probabilities of every
token (reverse KL; MiniLLM, arXiv 2306.08543; GKD, arXiv 2306.13649, section 3; with one response
and discount 0 as thinkingmachines.ai/blog/on-policy-distillation).

    A_i,t = log π_teacher(o_i,t) - log π_old(o_i,t)
    J     = 1/Σ_i |o_i| Σ_i Σ_t ρ A_i,t

Its expected gradient at ρ = 1 is that of -KL(π_θ ‖ π_teacher) at the states that the student
visits. R1-Zero's wide clips hardly ever bound ρ. Averaged per token; advantages are not normalized.
Rewards are reported but not used: an ungraded response is trained on too. With `discount` γ above 0
the advantage of a token includes those after it (γ = 1: the KL of whole responses). The metric
`teacher/kl` is the mean of -A at discount 0. One response per prompt is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.config.loss_settings import TokenAdvantageSettings

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig
    from megatron_r1.trainer.rollout_batches import RolloutBatches, TokenTargets


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Return 0 for every response: `token_advantages` uses the teacher's log-probabilities
    alone."""
    return [[0.0] * len(rewards) for rewards in groups]


def token_advantages(rollout: RolloutBatches, settings: TokenAdvantageSettings) -> TokenTargets:
    """Return A_t = Σ_{s≥t} γ^(s-t) (log π_teacher - log π_old)_s, from batch.logprobs["teacher"]
    and ["old"]; 0 outside responses."""
    from megatron_r1.trainer.rollout_batches import TokenTargets
    from megatron_r1.trainer.token_advantages import discounted_sums

    settings = TokenAdvantageSettings.of(settings)
    advantages = []
    for microbatch in rollout.whole_microbatches:
        logprobs = microbatch.batch.logprobs
        gaps = microbatch.gather(logprobs["teacher"] - logprobs["old"])
        mask, last = microbatch.is_response, microbatch.last_response_positions
        advantages.append(discounted_sums(gaps, settings.discount, mask, last))
    return TokenTargets(advantages)
