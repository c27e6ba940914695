"""DAPO: decoupled clip and dynamic sampling policy optimization (arXiv 2503.14476, eq. 8).

    J = 1/Σ_i |o_i| Σ_i Σ_t min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A),  A as GRPO's

GRPO with four changes, each a setting: ε_high above ε_low, so that unlikely tokens may grow
(section 3.1); groups without a difference are replaced (`dynamic_sampling`, 3.2); every token
weighs the same, those of long outputs too (`loss_average`, 3.3); a soft punishment of the last
tokens before the length limit (`overlong_buffer`, 3.4: 4,096 of 20,480). No KL.
"""

from __future__ import annotations

from megatron_r1.rl.algorithms.grpo import LOSS, advantages

__all__ = ["LOSS", "advantages"]
