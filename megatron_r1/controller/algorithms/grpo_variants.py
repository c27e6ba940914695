"""DAPO, Dr. GRPO and GSPO: GRPO's advantages and loss, each with settings of its own.

They have no code here, because every difference is a setting that any algorithm may take: their
values are in `config/algorithms.py`, and the functions that read them are named below.

DAPO: decoupled clip and dynamic sampling policy optimization (arXiv 2503.14476, eq. 8).

    J = 1/Σ_i |o_i| Σ_i Σ_t min(ρ A_i, clip(ρ, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

ε_high is above ε_low, so that unlikely tokens may grow (section 3.1); equal-reward groups are
replaced (setting `dynamic_sampling`, section 3.2; `dynamic_sampling.collect_informative`); the
average is per token, so that tokens of long responses weigh as much as others (`loss_average`,
section 3.3; `losses.denominator`); a soft punishment of responses near the length limit
(`overlong_buffer`, section 3.4, 4,096 of 20,480 tokens; `overlong.overlong_punishment`). No KL.

Dr. GRPO: GRPO without its two biases (arXiv 2503.20783, section 3.2).

    A_i = r_i - mean(r), over the G responses to one prompt
    J   = 1/(N L) Σ_i Σ_t min(ρ A_i, clip(ρ, 1 - ε, 1 + ε) A_i),  L a constant: max_response_tokens

Dividing by the standard deviation gives prompts that are nearly all right or all wrong more weight
(`advantage_std` none: `advantages.group_advantages`), and averaging per sequence, 1/|o_i|, makes
long wrong responses cheap (`loss_average` constant: `losses.denominator`). No KL.

GSPO: group sequence policy optimization (arXiv 2507.18071, eq. 5-7).

    s_i = (π_θ(o_i) / π_old(o_i))^(1/|o_i|)
    J   = 1/N Σ_i min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

The ratio belongs to the whole response, as its reward does (`ratio_level` sequence:
`r1_kernels.policy_loss`); it is the geometric mean of the tokens' ratios, so that responses of
different lengths compare. Averaged per sequence. The ratio moves much less than a token's, hence
the small clips (section 5.1, with four mini-batches per rollout). After an update some tokens take
other experts, which upsets token ratios but hardly moves this one."""

NAMES = ("dapo", "dr_grpo", "gspo")
