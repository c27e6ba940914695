"""Equality of rewards. A reward is a sum of weighted terms, so that two rewards of one value may
differ in their last bits: 0.1 + 0.2 is not 0.3 in floating point."""

import math
from collections.abc import Sequence

RELATIVE = 2.0**-22
"""Of the larger of two rewards: two units in the last place of a float32, which a reward model or
a user's function may have computed in."""
ABSOLUTE = 1e-12
"""Where terms of opposite sign cancel, what is left of rewards of order 1."""


def are_equal(rewards: Sequence[float]) -> bool:
    """Return whether all of `rewards` are the same but for rounding; True for none and for one."""
    if not rewards:
        return True
    return math.isclose(min(rewards), max(rewards), rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def order(one: float, other: float) -> int:
    """Return -1 if `one` is smaller, 1 if it is larger, 0 if the two are the same but for
    rounding."""
    return 0 if are_equal((one, other)) else -1 if one < other else 1
