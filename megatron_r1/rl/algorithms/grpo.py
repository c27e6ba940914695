"""GRPO: group relative policy optimization (DeepSeekMath, arXiv 2402.03300, section 4.1;
DeepSeek-R1, arXiv 2501.12948, eq. 1-3).

    A_i = (r_i - mean(r)) / std(r), over the G outputs of one question; the same for every token
    J   = 1/G Σ_i 1/|o_i| Σ_t [ min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) - β KL(π_θ ‖ π_ref) ]

with ρ = π_θ / π_old of token t; there is no critic. KL is in the loss, never in the reward, and
`kl_estimator` says which estimate of it. Masked: prompts, and what follows the end of a response.
`advantage_std` batch divides by the standard deviation of the rollout instead of the group's.
The defaults of `rl` are R1-Zero's, so nothing is left to set here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_r1.rl.advantages import group_advantages, over_batch_std

if TYPE_CHECKING:
    from megatron_r1.config import RLConfig
    from megatron_r1.training.head import Head
    from megatron_r1.training.losses import LossTerms
    from megatron_r1.training.packed import PackedBatch

LOSS = "megatron_r1.rl.algorithms.grpo:loss"


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Group-relative; 0 for an ungraded output, and for all of a group whose rewards are equal."""
    by = "group" if rl.advantage_std == "group" else "none"
    found = [group_advantages(g, divide_by=by, epsilon=rl.advantage_epsilon) for g in groups]
    if rl.advantage_std == "batch":
        return over_batch_std(found, groups, rl.advantage_epsilon)
    return found


def loss(batch: PackedBatch, head: Head, settings: dict[str, Any]) -> LossTerms:
    """-J, of the advantages in the batch. settings: those of r1_kernels' policy_loss; `average` is
    `rl.loss_average`, whose constant is max_response_tokens; importance_cap None leaves alone what
    the engine's log-probabilities differ by. Needs batch.logprobs["old"], except at the policy they
    are of, and, with kl_beta > 0, ["reference"]."""
    from megatron_r1.training.losses import LossTerms, denominator

    settings = dict(settings)
    average, limit = settings.pop("average"), settings.pop("max_response_tokens", None)
    assert limit or average != "constant", "a constant average is over max_response_tokens"
    corrected = settings["importance_cap"] is not None
    terms = head.policy_loss(
        **settings,
        average="sequence" if average == "sequence" else "token",
        rollout_logprobs=batch.rollout_logprobs if corrected else None,
        denominator=limit if average == "constant" else 1,
    )
    count = denominator(batch, average)
    sums = {
        "loss/denominator": terms.loss.detach(),
        "denominator": count,
        "kl/tokens": terms.kl.sum(),
        "clip_fraction/tokens": terms.clipped.sum(),
        "entropy/tokens": terms.entropy.sum(),
        "tokens": batch.is_response.sum(),
    }
    if corrected:
        sums["importance/tokens"] = terms.importance.sum()
    return LossTerms(terms.loss, count, sums, {"ratio/max": terms.ratio.amax()})
