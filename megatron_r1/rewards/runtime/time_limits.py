"""How long one grade may take before its worker is killed."""

from collections.abc import Mapping
from typing import Any

from megatron_r1.rewards.sandbox.limits import Limits

CODE = "code"
MARGIN_SECONDS = 15.0
"""Time to kill a program after the code reward's own limits are used up."""


def time_limit(kind: str, fields: Mapping[str, Any], seconds: float) -> float:
    """Return `seconds`, the pool's limit, or for programs what their own limits add up to.

    The code reward ends every program itself, and many tests may take longer than any formula
    should. One limit for both would fail such programs, or wait a minute for every formula that
    hangs.
    """
    if kind != CODE:
        return seconds
    try:
        return max(seconds, Limits.parse(fields.get("limits")).total_seconds + MARGIN_SECONDS)
    except (TypeError, ValueError):  # the reward raises it at once
        return seconds
