"""Whether a reward can grade at all, asked before engines start."""

from collections.abc import Awaitable, Callable

from megatron_r1.rewards import REGISTRY, REMOTE
from megatron_r1.rewards.base import UNGRADED, Grade

WELL_FORMED = "<think>I think.</think>\n<answer>{}</answer>"


async def find_fault(kind: str, truth: object, grade: Callable[[str], Awaitable[Grade]]) -> str:
    """Why `grade`, the reward `kind` with all its arguments but the response, cannot be used: a
    reason that begins with `base.UNGRADED`; "" when it can.

    The rewards of this package grade any text, the empty one too. A user's own may raise where
    there is no answer; one that raises on a well-formed answer as well is broken, or is called with
    what it does not take.
    """
    reason = (await grade("")).reason
    if reason.startswith(UNGRADED) and kind not in REGISTRY | REMOTE:
        reason = (await grade(WELL_FORMED.format(truth))).reason
    return reason if reason.startswith(UNGRADED) else ""
