"""Soft overlong punishment (DAPO, arXiv 2503.14476, section 3.4, eq. 13).

    0                          up to L - B tokens
    ((L - B) - length) / B     from there to L, where it is -1

L is the longest response that may be sampled, B a buffer before it. It is added to the reward that
advantages are made of, and to nothing that is reported: a truncated answer is mostly wrong for want
of room, and a reward that drops all at once at L says nothing of why.
"""

from __future__ import annotations


def overlong_punishment(num_tokens: int, limit: int, buffer: float) -> float:
    """From 0 to -1, of a response of num_tokens. limit: L, tokens; buffer: B as a share of it, 0
    for no punishment."""
    room = buffer * limit
    over = num_tokens - (limit - room)
    return -min(1.0, over / room) if room and over > 0 else 0.0
