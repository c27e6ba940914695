"""GSPO: group sequence policy optimization (arXiv 2507.18071, eq. 5-7).

    s_i = (π_θ(o_i) / π_old(o_i))^(1/|o_i|)
    J   = 1/N Σ_i min(s_i A_i, clip(s_i, 1 - ε_low, 1 + ε_high) A_i),  A as GRPO's

The ratio belongs to the whole response, as its reward does (`ratio_level` sequence); it is the
geometric mean of the tokens' ratios, so that responses of different lengths compare. Averaged per
sequence. The ratio moves much less than a token's, hence the small clips (section 5.1, with four
mini-batches per rollout). After an update some tokens take other experts, which upsets token ratios
but hardly moves this one.
"""
