"""Rewards: one file or folder per reward, one line per reward in a table of this file.

A reward is a pure function `grade(response: str, truth, **entry) -> Grade`, where `entry` holds the
prompt's other fields. It runs in a worker process of `runtime.pool.RewardPool`, so its module may
import any library. Rewards that request a served model are in `remote/`; `sandbox/` runs programs.

Patterns that repeat a group possessively are compiled by `regex`: Python's `re` before 3.11.5, as
in Debian 12, matches them wrongly (cpython#100061, #106052), and rewards would differ.
"""

import sys

from megatron_r1.errors import Cause, UserError, did_you_mean
from megatron_r1.rewards.base import Grade

FORM_REWARDS: dict[str, str] = {
    "conciseness": "megatron_r1.rewards.conciseness:grade",
    "format": "megatron_r1.rewards.format:grade",
    "language": "megatron_r1.rewards.language:grade",
    "repetition": "megatron_r1.rewards.repetition:grade",
}
"""Rewards that read the response alone. As a term they get no truth, and of the prompt's fields
only those of their signature: a code prompt's megabytes of tests are not sent to the workers."""
REGISTRY: dict[str, str] = {
    **FORM_REWARDS,
    "code": "megatron_r1.rewards.code:grade",
    "exact_match": "megatron_r1.rewards.exact_match:grade",
    "logic": "megatron_r1.rewards.logic:grade",
    "math": "megatron_r1.rewards.math:grade",
}
"""Rewards that run in worker processes: the short name of each with its function."""
REMOTE: dict[str, str] = {
    "helpful": "megatron_r1.rewards.reward_model:Helpful",
    "judge": "megatron_r1.rewards.judge:Judge",
    "safety": "megatron_r1.rewards.reward_model:Safety",
}
"""Rewards that request a served model: a class each (`remote.runner.RemoteReward`), no worker."""
ENVIRONMENT = "environment"
"""The kind of questions that an agent's environment grades (`get_reward`); no reward of ours."""
WITHOUT_TRUTH = (ENVIRONMENT, "helpful", "logic", "safety")
"""Rewards whose rows need no truth: they compare with nothing, or with a field of their own."""


def resolve(kind: str) -> str:
    """Return the "module:function" of a reward; kind: a registered name, or such a path itself.

    Raises UserError for an unknown kind, naming the known ones, and for a path into Python's own
    library: a row of a data set could otherwise name `builtins:exec` and contain its program."""
    known = REGISTRY | REMOTE | {ENVIRONMENT: f"{__name__}:refuse_environment"}
    if kind in known:
        return known[kind]
    module, _, function = kind.partition(":")
    is_file = module.endswith(".py")
    if not is_file and function.isidentifier() and _is_module(module):
        if module.split(".")[0] in sys.stdlib_module_names:
            raise UserError(
                f"reward kind {kind!r} is Python's own function, not a reward",
                key="kind",
                cause=Cause.UNSUPPORTED,
            )
        return kind
    if is_file:
        module = module[:-3].replace("/", ".")
    elif not function:
        module, _, function = kind.rpartition(".")
    hint = did_you_mean(kind, known)
    if function.isidentifier() and _is_module(module):
        hint = f"; did you mean '{module}:{function}'?"
    raise UserError(
        f"unknown reward kind {kind!r}{hint} (known: "
        f"{', '.join(sorted(known))}; your own is written 'package.module:function')",
        key="kind",
        cause=Cause.UNKNOWN,
    )


def refuse_environment(response: str, truth: object = None, **entry: object) -> Grade:
    """Raise UserError: the kind `environment` is graded by the environment of a run, while it plays
    the episode, and not by a reward."""
    raise UserError(
        f"only a run with `agents` grades the kind {ENVIRONMENT!r}, by the environment that plays "
        "its episodes; give the line the kind of a reward",
        key="kind",
        cause=Cause.CONFLICT,
    )


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
