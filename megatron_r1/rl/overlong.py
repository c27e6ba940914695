"""The soft punishment of responses near the length limit."""


def overlong_punishment(num_tokens: int, limit: int, buffer: float) -> float:
    """Return the soft punishment of a response of `num_tokens` tokens.

    DAPO, arXiv 2503.14476, section 3.4, eq. 13:

        0                          up to L - B tokens
        ((L - B) - length) / B     from there to L, where it is -1

    limit: L, the longest response that may be sampled. buffer: B as a share of L; 0 for no
    punishment. The reported reward leaves it out. It grows gradually, because after a sudden drop
    at L the policy could not tell a response that is too long from a wrong one."""
    buffer_tokens = buffer * limit
    excess = num_tokens - (limit - buffer_tokens)
    return -min(1.0, excess / buffer_tokens) if buffer_tokens and excess > 0 else 0.0
