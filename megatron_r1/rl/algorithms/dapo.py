"""DAPO: decoupled clip and dynamic sampling policy optimization (arXiv 2503.14476, eq. 8).

    J = 1/Σ_i |o_i| Σ_i Σ_t min(ρ A_i, clip(ρ, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

GRPO with four changes, each a setting: ε_high above ε_low, so that unlikely tokens may grow
(section 3.1); equal-reward groups are replaced (`dynamic_sampling`, 3.2); the average is per token,
so that tokens of long responses weigh as much as others (`loss_average`, 3.3); a soft punishment
of responses near the length limit (`overlong_buffer`, 3.4: 4,096 of 20,480 tokens). No KL.
"""
