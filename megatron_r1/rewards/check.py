"""Check, before engines start, that a reward can grade."""

from collections.abc import Awaitable, Callable

from megatron_r1.rewards import REGISTRY, REMOTE
from megatron_r1.rewards.base import UNGRADED, Grade

WELL_FORMED = "<think>I think.</think>\n<answer>{}</answer>"


async def find_fault(kind: str, truth: object, grade: Callable[[str], Awaitable[Grade]]) -> str:
    """Return why a reward cannot be used, beginning with `base.UNGRADED`, or "" if it can.

    grade: the reward `kind` with all arguments but the response. The rewards of this package grade
    any text, the empty one too. A user's own may raise where there is no answer; one that also
    raises on a well-formed answer is broken, or is called with arguments that it does not take.
    """
    reason = (await grade("")).reason
    if reason.startswith(UNGRADED) and kind not in REGISTRY | REMOTE:
        reason = (await grade(WELL_FORMED.format(truth))).reason
    return reason if reason.startswith(UNGRADED) else ""
