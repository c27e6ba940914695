"""Dr. GRPO: GRPO without its two biases (arXiv 2503.20783, section 3.2).

    A_i = r_i - mean(r)
    J   = 1/(G L) Σ_i Σ_t min(ρ A, clip(ρ, 1 - ε, 1 + ε) A),  L a constant: max_response_tokens

The standard deviation gives questions that are nearly all right or all wrong more weight, and
1/|o_i| makes long wrong outputs cheap; both are left out (`advantage_std` none, `loss_average`
constant). No KL.
"""

from __future__ import annotations

from megatron_r1.rl.algorithms.grpo import LOSS, advantages

__all__ = ["LOSS", "advantages"]
