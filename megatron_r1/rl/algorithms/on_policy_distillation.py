"""On-policy distillation: the student writes, the teacher scores every token (reverse KL; MiniLLM,
arXiv 2306.08543; GKD, arXiv 2306.13649, section 3; with one sample and discount 0 as
thinkingmachines.ai/blog/on-policy-distillation).

    A_i,t = log π_teacher(o_i,t) - log π_old(o_i,t)
    J     = 1/Σ_i |o_i| Σ_i Σ_t ρ A_i,t

whose expected gradient at ρ = 1 is that of -KL(π_θ ‖ π_teacher) at the states the student visits;
R1-Zero's wide clips hardly ever hold ρ.
Rewards are measured and not used: an output that nobody could grade teaches as well. `discount`
above 0 makes a token answer for those after it too (γ = 1: the whole sequence's KL). `teacher/kl`
in the metrics is the mean of -A at discount 0. One output per question is enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

TOKEN_ADVANTAGES = "megatron_r1.rl.algorithms.on_policy_distillation:token_advantages"


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """None yet: the teacher's word is all that counts."""
    return [[0.0] * len(rewards) for rewards in groups]


def token_advantages(scored: Scored, settings: dict[str, Any]) -> None:
    """Needs batch.logprobs["teacher"] beside ["old"]."""
    for responses in scored.responses:
        logprobs = responses.batch.logprobs
        gaps = responses.whole(logprobs["teacher"] - logprobs["old"])
        responses.keep(responses.discounted_sums(gaps, settings["discount"]))
