"""Rewards: one file per reward, one line per reward in `REGISTRY`.

A reward is a pure function `grade(response: str, truth, **entry) -> Grade`; `entry` holds whatever
else the prompt carries. It runs in a worker process of `pool.RewardPool`, so its module may import
what it likes: nothing here is imported by the controller.
"""

import difflib

from megatron_r1.rewards.base import Grade

REGISTRY: dict[str, str] = {
    "format": "megatron_r1.rewards.format:grade",
    "logic": "megatron_r1.rewards.logic:grade",
    "math": "megatron_r1.rewards.math:grade",
}


def resolve(kind: str) -> str:
    """The "module:function" that grades `kind`: a registered name, or such a path itself.

    Raises ValueError naming the nearest registered kind.
    """
    if kind in REGISTRY:
        return REGISTRY[kind]
    module, _, function = kind.partition(":")
    if function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return kind
    nearest = difflib.get_close_matches(kind, REGISTRY, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown reward kind {kind!r}: did you mean {nearest[0]!r}? Known: "
        f"{', '.join(sorted(REGISTRY))}; your own is written 'package.module:function'"
    )


__all__ = ["REGISTRY", "Grade", "resolve"]
