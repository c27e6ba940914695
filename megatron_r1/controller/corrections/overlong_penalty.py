"""`rl.overlong_buffer`: a penalty of responses near the limit of tokens (soft overlong punishment:
DAPO, arXiv 2503.14476, section 3.4, eq. 13), times `rl.overlong_penalty`.

    0                          up to L - B tokens
    ((L - B) - length) / B     from there to L, where it is -1

The reported reward leaves the penalty out. It grows gradually, because after a sudden drop at L the
policy could not tell a response that is too long from a wrong one."""


def overlong_penalty(num_tokens: int, limit: int, buffer: float, largest: float = 1.0) -> float:
    """Return what is added to the reward of a response of `num_tokens` tokens, at most 0.

    Args:
        num_tokens: the response's length.
        limit: L, the longest response that may be sampled.
        buffer: B as a share of L; 0 for no penalty.
        largest: the penalty at L (`rl.overlong_penalty`)."""
    buffer_tokens = buffer * limit
    excess = num_tokens - (limit - buffer_tokens)
    return -largest * min(1.0, excess / buffer_tokens) if buffer_tokens and excess > 0 else 0.0
