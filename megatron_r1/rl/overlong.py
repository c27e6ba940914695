"""Soft overlong punishment (DAPO, arXiv 2503.14476, section 3.4, eq. 13).

    0                          up to L - B tokens
    ((L - B) - length) / B     from there to L, where it is -1

L is the longest response that may be sampled, B a buffer before it. The punishment is added to the
reward that advantages are computed from, and to no reported reward: a truncated answer is mostly
wrong for lack of room, and a reward that drops at once at L does not show the policy why.
"""

from __future__ import annotations


def overlong_punishment(num_tokens: int, limit: int, buffer: float) -> float:
    """Return the punishment, from 0 to -1, of a response of `num_tokens`.

    limit: L, tokens. buffer: B as a share of L; 0 for no punishment.
    """
    buffer_tokens = buffer * limit
    excess = num_tokens - (limit - buffer_tokens)
    return -min(1.0, excess / buffer_tokens) if buffer_tokens and excess > 0 else 0.0
