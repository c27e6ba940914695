"""How often a verifier errs: wrongly rejected and wrongly accepted responses, by a second reader.

Responses are *accepted* where their reward is 1, else *rejected*. A stratum has the responses of
one data source, one kind and one of these verdicts; the sample takes about as many of each
(`draw_sample`). A second reader reads the drawn ones (`PooledSecondReader`), and a verdict is

- wrong, where both verdicts on an answer, or all runs of a program, contradict it,
- confirmed, where at least a part of it confirms and none that decides more contradicts it,
- undecided otherwise: it counts as no error at the interval's lower end, as an error at the upper.

The intervals are those of `fraction_intervals`. They cover the draw, but not what both methods get
wrong alike."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from r1_grading import Grade, RewardPool
from r1_grading.terms import RUN_ARGUMENTS, reward_arguments

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.evaluation.fraction_intervals import (
    FractionEstimate,
    combined_fraction,
    sampled_fraction,
)

Outcome = Literal["confirmed", "wrong", "undecided"]
READER = "r1_grading.second_readers.mathematics:grade"
REPEATS = 3
"""Runs of a program's tests: one verdict may be chance."""
MATH_VERIFY = "math-verify"
"""A verifier that the second reader is partly made of."""
AUDITED_REWARDS = ("math", "code")
"""The kinds that have a second reader."""
ACCEPTED_REWARD = 1.0


@dataclass(frozen=True)
class AnswerContent:
    """What a second reader reads.

    Attributes:
        response: the response's text.
        truth: what it was graded against.
        fields: the prompt's other fields, and the `RUN_ARGUMENTS` of the response."""

    response: str
    truth: Any
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class AuditedResponse:
    """A response with the verdict that is audited.

    Attributes:
        id: where it was logged, for the reader of the report.
        source: its data source.
        kind: the reward that graded it.
        group: what the responses to one question share; None for one without.
        reward: by that reward alone, 1 for a right answer.
        total: what advantages are computed of; None if ungraded.
        weight: by how much `total` changes where `reward` changes by 1.
        load: returns the content, which may be on disk."""

    id: str
    source: str
    kind: str
    group: str | None
    reward: float
    total: float | None
    load: Callable[[], AnswerContent] = field(repr=False, compare=False)
    weight: float = 1.0

    @property
    def is_accepted(self) -> bool:
        """Whether its reward is that of a right answer."""
        return self.reward >= ACCEPTED_REWARD

    @property
    def can_be_audited(self) -> bool:
        """Whether it was graded, by a reward with a second reader."""
        return self.total is not None and self.kind in AUDITED_REWARDS

    @property
    def stratum(self) -> Stratum:
        """The stratum of the sample that it belongs to."""
        return self.source, self.kind, self.is_accepted


Stratum = tuple[str, str, bool]
"""Data source, kind, and whether its responses are accepted."""


@dataclass(frozen=True)
class SecondReaderVerdict:
    """What the second reader says of a verdict, with the reason."""

    outcome: Outcome
    reason: str


SecondReader = Callable[[AuditedResponse], Awaitable[SecondReaderVerdict]]


@dataclass(frozen=True)
class ErrorRates:
    """The errors of a verifier, of one data source or of all.

    Attributes:
        wrongly_rejected: the fraction of rejected responses that are right; None if none is
            rejected.
        wrongly_accepted: the fraction of accepted responses that are wrong; None if none is
            accepted."""

    wrongly_rejected: FractionEstimate | None
    wrongly_accepted: FractionEstimate | None


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


def group_by_stratum(responses: Iterable[AuditedResponse]) -> dict[Stratum, list[AuditedResponse]]:
    """Return the responses that can be audited by stratum, in the order of the strata."""
    strata: dict[Stratum, list[AuditedResponse]] = defaultdict(list)
    for response in responses:
        if response.can_be_audited:
            strata[response.stratum].append(response)
    return dict(sorted(strata.items()))


def draw_sample(
    strata: Mapping[Stratum, Sequence[AuditedResponse]], size: int, seed: int
) -> dict[Stratum, list[AuditedResponse]]:
    """Draw about as many responses of each stratum, without replacement, and a small one whole.

    Args:
        strata: as `group_by_stratum` returns them.
        size: how many to draw of all together.
        seed: the same seed draws the same responses.

    Raises:
        UserError: fewer than one for each stratum."""
    if size < len(strata):
        raise UserError(
            f"--size {size}: there are {len(strata)} strata (data source, kind, verdict), and "
            "each needs at least one response; give more",
            key="--size",
            cause=Cause.OUT_OF_RANGE,
        )
    drawn = {}
    num_left = size
    by_size = sorted(strata, key=lambda stratum: len(strata[stratum]))
    for index, stratum in enumerate(by_size):
        count = min(len(strata[stratum]), num_left // (len(by_size) - index))
        num_left -= count
        rng = random.Random(f"{seed}:{stratum}")
        drawn[stratum] = rng.sample(list(strata[stratum]), count)
    return {stratum: drawn[stratum] for stratum in strata}


def error_rates(
    strata: Mapping[Stratum, Sequence[AuditedResponse]],
    judged_responses: Mapping[Stratum, Sequence[AuditedResponse]],
    second_verdicts: Mapping[str, SecondReaderVerdict],
    source: str | None = None,
) -> ErrorRates:
    """Return the estimated errors.

    Args:
        strata: all responses.
        judged_responses: those that were judged.
        second_verdicts: id → second verdict, of each drawn one.
        source: the data source; None: all."""
    fractions: dict[bool, list[FractionEstimate]] = {False: [], True: []}
    for stratum, responses in judged_responses.items():
        if source in (None, stratum[0]):
            outcomes = [second_verdicts[response.id].outcome for response in responses]
            counts = (outcomes.count(outcome) for outcome in ("wrong", "undecided"))
            fractions[stratum[2]].append(
                sampled_fraction(len(strata[stratum]), len(responses), *counts)
            )
    rejected, accepted = (
        combined_fraction(stratum_fractions) if stratum_fractions else None
        for stratum_fractions in fractions.values()
    )
    return ErrorRates(rejected, accepted)


async def read_second_verdicts(
    responses: Iterable[AuditedResponse], second_reader: SecondReader
) -> dict[str, SecondReaderVerdict]:
    """Return id → second verdict of each response; the pool limits how many are read at a time."""
    responses = list(responses)
    second_verdicts = await asyncio.gather(*(second_reader(response) for response in responses))
    ids = (response.id for response in responses)
    return dict(zip(ids, second_verdicts, strict=True))
