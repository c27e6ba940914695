"""GSPO: group sequence policy optimization (arXiv 2507.18071, eq. 5-7).

    s_i = (π_θ(o_i) / π_old(o_i))^(1/|o_i|)
    J   = 1/G Σ_i min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

The ratio belongs to the whole output, as its reward does (`ratio_level` sequence): the geometric
mean of its tokens', so that lengths compare. It moves much less than a token's, whence the small
clips (section 5.1, with four mini-batches per rollout). Experts that route otherwise after an
update, which upset token ratios, hardly move it.
"""

from __future__ import annotations

from megatron_r1.rl.algorithms.grpo import LOSS, advantages

__all__ = ["LOSS", "advantages"]
