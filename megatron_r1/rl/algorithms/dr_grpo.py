"""Dr. GRPO: GRPO without its two biases (arXiv 2503.20783, section 3.2).

    A_i = r_i - mean(r), over the G responses to one prompt
    J   = 1/(N L) Σ_i Σ_t min(ρ A_i, clip(ρ, 1 - ε, 1 + ε) A_i),  L a constant: max_response_tokens

Dividing by the standard deviation gives prompts that are nearly all right or all wrong more weight,
and averaging per sequence, 1/|o_i|, makes long wrong responses cheap; both are left out
(`advantage_std` none, `loss_average` constant). No KL.
"""
