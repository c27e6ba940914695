"""GRPO's loss on a packed batch.

J = 1/G Σ_i 1/|o_i| Σ_t [ min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A) - β KL(π_θ ‖ π_ref) ], ρ = π_θ
/ π_old (DeepSeek-R1, arXiv 2501.12948, eq. 1); the per-token term is r1_kernels' policy_loss. With
`average` "token" the sum runs over all tokens of the mini-batch alike (DAPO, arXiv 2503.14476, eq.
8). Masked: prompt tokens, and what follows the end of a response."""

from __future__ import annotations

from typing import Any

import torch
from r1_kernels.reference import policy_loss
from torch import Tensor

from megatron_r1.training.losses import LossTerms, token_weights
from megatron_r1.training.packed import PackedBatch


def grpo_loss(
    batch: PackedBatch, logprobs: Tensor, entropy: Tensor, settings: dict[str, Any]
) -> LossTerms:
    """settings: average, clip_low, clip_high, kl_beta. Needs batch.logprobs["old"] and, with
    kl_beta > 0, ["reference"]."""
    weights, denominator = token_weights(batch, settings["average"])
    terms = policy_loss(
        logprobs,
        batch.logprobs["old"],
        batch.logprobs.get("reference"),
        batch.advantages,
        weights,
        clip_low=settings["clip_low"],
        clip_high=settings["clip_high"],
        kl_beta=settings["kl_beta"],
    )
    seen = batch.is_response
    sums = {
        "loss/denominator": terms.loss.detach(),
        "denominator": denominator,
        "kl/tokens": terms.kl[seen].sum(),
        "clip_fraction/tokens": terms.clipped[seen].sum(),
        "entropy/tokens": entropy.detach()[seen].sum(),
        "tokens": seen.sum(),
    }
    maxima = {"ratio/max": terms.ratio[seen].amax() if seen.any() else torch.zeros(())}
    return LossTerms(terms.loss, denominator, sums, maxima)
