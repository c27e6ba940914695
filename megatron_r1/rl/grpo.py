"""GRPO's loss on a packed batch.

J = 1/G Σ_i 1/|o_i| Σ_t [ min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) - β KL(π_θ ‖ π_ref) ], ρ = π_θ
/ π_old (DeepSeek-R1, arXiv 2501.12948, eq. 1); the per-token term and its variants are
r1_kernels' (`policy_terms`). With `average` "token" the sum runs over all tokens of the mini-batch
alike (DAPO, arXiv 2503.14476, eq. 8). Masked: prompt tokens, and what follows the end of a
response."""

from __future__ import annotations

from typing import Any

from megatron_r1.training.head import Head
from megatron_r1.training.losses import LossTerms, denominator
from megatron_r1.training.packed import PackedBatch


def grpo_loss(batch: PackedBatch, head: Head, settings: dict[str, Any]) -> LossTerms:
    """settings: those of r1_kernels' policy_loss; importance_cap None leaves what the engine's
    log-probabilities differ by alone. Needs batch.logprobs["old"], except at the policy they are
    of, and, with kl_beta > 0, ["reference"]."""
    corrected = settings["importance_cap"] is not None
    terms = head.policy_loss(
        **settings,
        rollout_logprobs=batch.rollout_logprobs if corrected else None,
        denominator=1,
    )
    count = denominator(batch, settings["average"])
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
