"""The rewards: what each returns (`Grade`), and a row for each in the table `REWARD_KINDS`.

A reward is a pure function `grade(response: str, truth, **entry) -> Grade`, where `entry` holds the
prompt's other fields. It runs in a worker process of `pool.RewardPool`, so its module may import
any library. Rewards that request a served model are in `remote/`; `sandbox/` runs programs.

Patterns that repeat a group possessively are compiled by `regex`: Python's `re` before 3.11.5, as
in Debian 12, matches them wrongly (cpython#100061, #106052), and rewards would differ."""

import sys
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


@dataclass(frozen=True)
class RewardKind:
    """What a shipped reward reads, requests and needs: its row of `REWARD_KINDS`.

    Attributes:
        path: "module:function"; "module:Class" of a served reward.
        is_served: whether it requests a served model by a class (`remote.remote_rewards`); others
            run in worker processes.
        reads_response_only: whether it reads the response alone. As a term it gets no truth, and of
            the prompt's fields only those of its signature: a code prompt's megabytes of tests are
            not sent to the workers.
        reads_answer: whether it has the option `reading`, which `rewards.reading` sets.
        compares_truth: whether it compares an answer with one or any of several truths.
        needs_truth: whether rows of this kind need a truth; others compare with nothing, or with a
            field of their own.
        runs_programs: whether it runs the response's program, in the sandbox. `why` calls the
            others that read more than the response in its own process.
        truth_meaning: what a column of its truths holds, to be reported where the kind is guessed
            (`truths.guess_reward_kind`); {!r} is the column's name. "" for one that never is."""

    path: str
    is_served: bool = False
    reads_response_only: bool = False
    reads_answer: bool = False
    compares_truth: bool = False
    needs_truth: bool = True
    runs_programs: bool = False
    truth_meaning: str = ""


REWARD_KINDS: dict[str, RewardKind] = {
    "math": RewardKind(
        "r1_grading.math:grade",
        reads_answer=True,
        compares_truth=True,
        truth_meaning="{!r} is compared as a number, a formula or words",
    ),
    "logic": RewardKind("r1_grading.logic:grade", reads_answer=True, needs_truth=False),
    "exact_match": RewardKind(
        "r1_grading.exact_match:grade",
        reads_answer=True,
        compares_truth=True,
        truth_meaning="{!r} holds names or phrases, any of which is right",
    ),
    "code": RewardKind(
        "r1_grading.code:grade",
        runs_programs=True,
        truth_meaning="{!r} holds tests of a program",
    ),
    "conciseness": RewardKind(
        "r1_grading.response_rewards:grade_conciseness", reads_response_only=True
    ),
    "format": RewardKind("r1_grading.response_rewards:grade_format", reads_response_only=True),
    "language": RewardKind("r1_grading.response_rewards:grade_language", reads_response_only=True),
    "repetition": RewardKind(
        "r1_grading.response_rewards:grade_repetition", reads_response_only=True
    ),
    "helpful": RewardKind(
        "r1_grading.remote.reward_model:Helpful", is_served=True, needs_truth=False
    ),
    "judge": RewardKind("r1_grading.remote.judge:Judge", is_served=True),
    "safety": RewardKind(
        "r1_grading.remote.reward_model:Safety", is_served=True, needs_truth=False
    ),
}
"""The shipped rewards by their short names. All other tables of rewards are derived from it."""
RESPONSE_ONLY_REWARDS: dict[str, str] = {
    name: kind.path for name, kind in REWARD_KINDS.items() if kind.reads_response_only
}
"""Rewards that read the response alone, with their functions."""
GRADERS: dict[str, str] = {
    name: kind.path for name, kind in REWARD_KINDS.items() if not kind.is_served
}
"""Rewards that run in worker processes: the short name of each with its function."""
SERVED_REWARDS: dict[str, str] = {
    name: kind.path for name, kind in REWARD_KINDS.items() if kind.is_served
}
"""Rewards that request a served model: a class each (`remote.remote_rewards`), no worker."""
ENVIRONMENT = "environment"
"""The kind of questions that an agent's environment grades (`get_reward`); no built-in reward."""
WITHOUT_TRUTH = (
    ENVIRONMENT,
    *(name for name, kind in REWARD_KINDS.items() if not kind.needs_truth),
)
"""Kinds whose rows need no truth."""


def resolve_reward(kind: str) -> str:
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
