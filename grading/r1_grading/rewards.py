"""The rewards: what each returns (`Grade`), and a line for each in a table of this file.

A reward is a pure function `grade(response: str, truth, **entry) -> Grade`, where `entry` holds the
prompt's other fields. It runs in a worker process of `pool.RewardPool`, so its module may import
any library. Rewards that request a served model are in `remote/`; `sandbox/` runs programs.

Patterns that repeat a group possessively are compiled by `regex`: Python's `re` before 3.11.5, as
in Debian 12, matches them wrongly (cpython#100061, #106052), and rewards would differ."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from r1_grading.base.errors import FORMER_PACKAGE, Cause, UserError, did_you_mean, shorten

MAX_REASON_CHARS = 500
UNGRADED = "cannot be graded"
"""The start of the reason of an ungraded response (`Grade.ungraded`)."""


@dataclass(frozen=True)
class Grade:
    """One reward's result for one response.

    Attributes:
        limits: the smallest and the largest reward; `FiniteGrade` has wider ones.
        reward: a number within `limits`, from 0 to 1.
        reason: one line for a person who audits the sample, cut to 500 characters.
        is_graded: False where the reward itself failed, so that its 0 does not measure the
            response.
        verdict: the result by name, where the caller needs more than the number, such as the filter
            that objected.
        missing: the fields without which the reward could not be called.

    Raises:
        ValueError: a reward outside the limits, or NaN."""

    limits: ClassVar[tuple[float, float]] = 0.0, 1.0

    reward: float
    reason: str
    is_graded: bool = True
    verdict: str = ""
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.reward, str) or self.reward is None:
            raise ValueError(f"the reward must be a number, got {self.reward!r}")
        lowest, highest = self.limits
        if not lowest <= self.reward <= highest:
            raise ValueError(
                f"reward must be between {lowest:g} and {highest:g}, got {self.reward!r} "
                f"({self.reason})"
            )
        object.__setattr__(self, "reward", float(self.reward))
        object.__setattr__(self, "reason", shorten(self.reason, MAX_REASON_CHARS))

    @classmethod
    def ungraded(cls, fault: object, missing: tuple[str, ...] = ()) -> "Grade":
        """Return the grade of a response that the reward could not grade because of `fault`."""
        return cls(0.0, f"{UNGRADED}: {fault}", is_graded=False, missing=missing)


class FiniteGrade(Grade):
    """The grade of a user's environment, or of a function written for verl or TRL.

    Its reward may be any finite number."""

    limits = (-sys.float_info.max, sys.float_info.max)


def find_non_finite(value: object, path: str) -> str:
    """Return "truth.result is NaN" for a number in `value` that JSON does not have, or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {'NaN' if math.isnan(value) else 'Infinity'}, which is no JSON number"
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return next(filter(None, (find_non_finite(item, f"{path}.{key}") for key, item in items)), "")


RESPONSE_ONLY_REWARDS: dict[str, str] = {
    "conciseness": "r1_grading.response_rewards:grade_conciseness",
    "format": "r1_grading.response_rewards:grade_format",
    "language": "r1_grading.response_rewards:grade_language",
    "repetition": "r1_grading.response_rewards:grade_repetition",
}
"""Rewards that read the response alone. As a term they get no truth, and of the prompt's fields
only those of their signature: a code prompt's megabytes of tests are not sent to the workers."""
GRADERS: dict[str, str] = {
    **RESPONSE_ONLY_REWARDS,
    "code": "r1_grading.code:grade",
    "exact_match": "r1_grading.exact_match:grade",
    "logic": "r1_grading.logic:grade",
    "math": "r1_grading.math:grade",
}
"""Rewards that run in worker processes: the short name of each with its function."""
SERVED_REWARDS: dict[str, str] = {
    "helpful": "r1_grading.remote.reward_model:Helpful",
    "judge": "r1_grading.remote.judge:Judge",
    "safety": "r1_grading.remote.reward_model:Safety",
}
"""Rewards that request a served model: a class each (`remote.remote_rewards`), no worker."""
ENVIRONMENT = "environment"
"""The kind of questions that an agent's environment grades (`get_reward`); no built-in reward."""
WITHOUT_TRUTH = (ENVIRONMENT, "helpful", "logic", "safety")
"""Rewards whose rows need no truth: they compare with nothing, or with a field of their own."""


def resolve(kind: str) -> str:
    """Return the "module:function" of a reward.

    Args:
        kind: a registered name, or such a path itself.

    Raises:
        UserError: an unknown kind, naming the known ones, and a path into Python's own library: a
            row of a data set could otherwise name `builtins:exec` and contain its program."""
    paths = GRADERS | SERVED_REWARDS | {ENVIRONMENT: f"{__name__}:refuse_environment"}
    if kind in paths:
        return paths[kind]
    module, _, function = kind.partition(":")
    if f"{module}.".startswith(f"{FORMER_PACKAGE}."):
        name = module.removeprefix(FORMER_PACKAGE).strip(".").partition(".")[0]
        raise UserError(
            f"reward kind {kind!r}: {FORMER_PACKAGE} is the package r1_grading now; write "
            + (repr(name) if name in paths else "the reward's new name"),
            key="kind",
            cause=Cause.UNKNOWN,
        )
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
    hint = did_you_mean(kind, paths)
    if function.isidentifier() and _is_module(module):
        hint = f"; did you mean '{module}:{function}'?"
    raise UserError(
        f"unknown reward kind {kind!r}{hint} (known: "
        f"{', '.join(sorted(paths))}; your own is written 'package.module:function')",
        key="kind",
        cause=Cause.UNKNOWN,
    )


def refuse_environment(response: str, truth: object = None, **entry: object) -> Grade:
    """Raise UserError: no reward grades the kind `environment`.

    The environment of a run grades it while it plays the episode."""
    raise UserError(
        f"only a run with `agents` grades the kind {ENVIRONMENT!r}, by the environment that plays "
        "its episodes; give the line the kind of a reward",
        key="kind",
        cause=Cause.CONFLICT,
    )


def _is_module(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
