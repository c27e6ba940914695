"""What a second reader says of a verdict.

It reads mathematics in another way, and runs the tests of programs again. A verdict is

- wrong, where both verdicts on an answer, or all runs of a program, contradict it,
- confirmed, where at least a part of it confirms and none that decides more contradicts it,
- undecided otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from r1_grading import Grade, RewardPool
from r1_grading.terms import RUN_ARGUMENTS, reward_arguments

from megatron_r1.evaluation.verifier_errors import (
    ACCEPTED_REWARD,
    AnswerContent,
    AuditedResponse,
    Outcome,
    SecondReaderVerdict,
)

READER = "r1_grading.second_readers.mathematics:grade"
REPEATS = 3
"""Runs of a program's tests: one verdict may be chance."""
MATH_VERIFY = "math-verify"
"""A verifier that the second reader is partly made of."""


class PooledSecondReader:
    """The second reader in the workers of a pool: it reads mathematics in another way, and runs
    the tests of programs again.

    Args:
        pool: the workers.
        options: reward → its options, `rewards.options` with `rewards.reading`.
        repeats: runs of a program's tests; different verdicts leave it undecided.
        without_math_verify: read mathematics by values at points alone, which verdicts of
            math-verify need."""

    def __init__(
        self,
        pool: RewardPool,
        options: Mapping[str, Mapping[str, Any]],
        repeats: int = REPEATS,
        *,
        without_math_verify: bool = False,
    ) -> None:
        self._pool, self._options, self._repeats = pool, options, repeats
        self._without_math_verify = without_math_verify

    async def read(self, response: AuditedResponse) -> SecondReaderVerdict:
        """Return what the second reader says of one verdict. A response that it cannot read within
        its limits is undecided."""
        content = response.load()
        fields = dict(content.fields)
        run_arguments = {name: fields.pop(name) for name in RUN_ARGUMENTS if name in fields}
        arguments = reward_arguments(response.kind, self._options, fields, run_arguments)
        if response.kind == "code":
            return await self._run_again(response.is_accepted, content, arguments)
        reading_options: dict[str, Any] = {
            name: arguments[name] for name in ("thought_opened", "reading") if name in arguments
        }
        if self._without_math_verify:  # then it is not in the reason either
            reading_options["without_math_verify"] = True
        grade = await self._pool.grade(READER, content.response, content.truth, **reading_options)
        return read_mathematics(
            response.is_accepted, grade, without_math_verify=self._without_math_verify
        )

    async def _run_again(
        self, is_accepted: bool, content: AnswerContent, arguments: Mapping[str, Any]
    ) -> SecondReaderVerdict:
        passes: list[bool] = []
        for _ in range(self._repeats):
            grade = await self._pool.grade("code", content.response, content.truth, **arguments)
            if not grade.is_graded:
                return SecondReaderVerdict("undecided", grade.reason)
            passes.append(grade.reward >= ACCEPTED_REWARD)
            if passes[-1] != passes[0]:
                reason = f"passes in {sum(passes)} of {len(passes)} runs; {grade.reason}"
                return SecondReaderVerdict("undecided", f"flaky: {reason}")
        reason = f"{self._repeats} runs of its tests: {grade.reason}"
        return SecondReaderVerdict(classify_runs(is_accepted, passes), reason)


class MathematicsVerdicts(NamedTuple):
    """What the second reader's two methods say of an answer: "right", "wrong" or "unsure"."""

    math_verify: str
    sampled_values: str


def mathematics_verdicts(grade: Grade) -> MathematicsVerdicts:
    """Return what a grade of the second reader says; one without a verdict (out of time or memory,
    a malformed truth) is unsure."""
    return MathematicsVerdicts(*(grade.verdict or "unsure,unsure").split(","))


def read_mathematics(
    is_accepted: bool, grade: Grade, *, without_math_verify: bool = False
) -> SecondReaderVerdict:
    """Return what the second reader says of a verdict.

    Args:
        is_accepted: whether the verdict is that the answer is right.
        grade: the second reader's.
        without_math_verify: leave its verdict by math-verify out."""
    math_verify, sampled_values = mathematics_verdicts(grade)
    if without_math_verify:
        math_verify = sampled_values
    return SecondReaderVerdict(
        classify_verdict(is_accepted, math_verify, sampled_values), grade.reason
    )


def classify_runs(is_accepted: bool, passes: Sequence[bool]) -> Outcome:
    """Return what runs of a program's tests say of a verdict; different runs leave it undecided.

    Args:
        is_accepted: whether the verdict is that the program is right.
        passes: whether the program passes, in each run."""
    if len(set(passes)) > 1:
        return "undecided"
    return "confirmed" if passes[0] == is_accepted else "wrong"


def classify_verdict(is_accepted: bool, math_verify: str, sampled_values: str) -> Outcome:
    """Return what two methods say of a verdict; each says "right", "wrong" or "unsure".

    | math-verify | values at points | outcome |
    |---|---|---|
    | contradicts | contradict | wrong |
    | anything | confirm | confirmed |
    | confirms | unsure | confirmed |
    | anything else | | undecided |

    Args:
        is_accepted: whether the verdict is that the answer is right.
        math_verify: what math-verify says.
        sampled_values: what values at points say."""
    verdict, contrary = ("right", "wrong") if is_accepted else ("wrong", "right")
    if sampled_values == verdict or (sampled_values == "unsure" and math_verify == verdict):
        return "confirmed"
    return "wrong" if sampled_values == math_verify == contrary else "undecided"
