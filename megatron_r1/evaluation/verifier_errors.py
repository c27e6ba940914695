"""How often a verifier errs: wrongly rejected and wrongly accepted responses, by a second method.

Responses are *accepted* where their reward is 1, else *rejected*. A stratum has the responses of
one data source, one kind and one of these verdicts; the sample takes about as many of each
(`draw_sample`). A second method reads the drawn ones (`SecondMethodJudge`), and a verdict is

- wrong, where everything that the second method is sure of contradicts it,
- confirmed, where at least a part of it confirms and none that decides more contradicts it,
- undecided otherwise: it counts as no error at the interval's lower end, as an error at the upper.

**The interval of one stratum.** n of N members are drawn without replacement and x of them are
wrong. It has every count M for which neither tail of the hypergeometric distribution is below 2.5%:

    P(X >= x | N, M, n) > 0.025  and  P(X <= x | N, M, n) > 0.025

(Buonaccorsi 1987, The American Statistician 41, 215; Clopper and Pearson's for N → ∞). It covers
with at least 95% for every M; where all are drawn it is the count itself. **Several strata**: for
Σ w p, with an interval (l, u) of each p, from Σ w p - √Σ w² (p - l)² to Σ w p + √Σ w² (u - p)²
(Zou, Huang and Zhang 2009, Computational Statistics & Data Analysis 53, 1080).

The interval covers the draw. It does not cover what both methods get wrong alike."""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from r1_grading import RewardPool
from r1_grading.terms import FACTS, call_fields

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.evaluation.estimates import CONFIDENCE

TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class FractionEstimate:
    """A fraction of a population with its 95% interval.

    Attributes:
        population: how many there are.
        sampled: how many of them were drawn at random.
        found: drawn ones that have the property.
        undecided: drawn ones that may have it or not.
        value: the fraction among the decided; None where none is.
        low: the lower end of the interval.
        high: its upper end."""

    population: int
    sampled: int
    found: int
    undecided: int
    value: float | None
    low: float
    high: float


def sampled_fraction(
    population: int, sampled: int, found: int, undecided: int = 0
) -> FractionEstimate:
    """Return the fraction of a population by one random sample of it, drawn without replacement.

    Args:
        population: N, at least 1.
        sampled: n of them, at least 1.
        found: how many of these have the property.
        undecided: how many of these may have it or not.

    Raises:
        ValueError: counts that do not fit each other."""
    if not 1 <= sampled <= population or min(found, undecided) < 0 or found + undecided > sampled:
        raise ValueError(
            f"{found} found and {undecided} undecided of {sampled} drawn of {population}: each has "
            "to be a part of the next"
        )
    decided = sampled - undecided
    return FractionEstimate(
        population,
        sampled,
        found,
        undecided,
        found / decided if decided else None,
        _least(population, sampled, found) / population,
        _most(population, sampled, found + undecided) / population,
    )


def combined_fraction(fractions: Sequence[FractionEstimate]) -> FractionEstimate:
    """Return the fraction of all strata together, each sampled by itself.

    Args:
        fractions: those of the strata, at least one.

    Raises:
        ValueError: no stratum."""
    if not fractions:
        raise ValueError("a fraction of no stratum at all")
    if len(fractions) == 1:
        return fractions[0]
    population = sum(fraction.population for fraction in fractions)
    weights = [fraction.population / population for fraction in fractions]
    pairs = list(zip(weights, fractions, strict=True))
    # Each end from the fractions that it counts: the undecided are without, or with, the property.
    least = [fraction.found / fraction.sampled for fraction in fractions]
    most = [(fraction.found + fraction.undecided) / fraction.sampled for fraction in fractions]
    below = math.hypot(
        *(w * (p - stratum.low) for (w, stratum), p in zip(pairs, least, strict=True))
    )
    above = math.hypot(
        *(w * (stratum.high - p) for (w, stratum), p in zip(pairs, most, strict=True))
    )
    low = sum(w * p for w, p in zip(weights, least, strict=True)) - below
    high = sum(w * p for w, p in zip(weights, most, strict=True)) + above
    values = [fraction.value for fraction in fractions]
    value = None
    if None not in values:
        value = sum(w * p for w, p in zip(weights, values, strict=True) if p is not None)
    return FractionEstimate(
        population,
        sum(fraction.sampled for fraction in fractions),
        sum(fraction.found for fraction in fractions),
        sum(fraction.undecided for fraction in fractions),
        value,
        max(0.0, low),
        min(1.0, high),
    )


@functools.lru_cache(maxsize=4_096)
def _least(population: int, sampled: int, found: int) -> int:
    """Return the smallest count M in the interval: P(X >= found) grows with M."""
    low, high = found, population - (sampled - found)
    while low < high:
        middle = (low + high) // 2
        if 1 - _at_most(found - 1, population, middle, sampled) > TAIL:
            high = middle
        else:
            low = middle + 1
    return low


def _most(population: int, sampled: int, found: int) -> int:
    """Return the largest count M in the interval: P(X <= found) falls with M."""
    return population - _least(population, sampled, sampled - found)


def _at_most(count: int, population: int, marked: int, sampled: int) -> float:
    """Return P(X <= count) of the hypergeometric distribution.

    Args:
        count: the most marked ones among those drawn.
        population: how many there are.
        marked: how many of the population are marked.
        sampled: how many are drawn."""
    first = max(0, sampled - (population - marked))
    log_samples = _log_choose(population, sampled)
    return math.fsum(
        math.exp(
            _log_choose(marked, drawn)
            + _log_choose(population - marked, sampled - drawn)
            - log_samples
        )
        for drawn in range(first, min(count, marked, sampled) + 1)
    )


def _log_choose(total: int, part: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(part + 1) - math.lgamma(total - part + 1)


Outcome = Literal["confirmed", "wrong", "undecided"]
READER = "r1_grading.second_readers.mathematics:grade"
REPEATS = 3
"""Runs of a program's tests: one verdict may be chance."""
AUDITED = ("math", "code")
"""The kinds that have a second method."""
SOURCE_FIELDS = ("data_source", "source", "dataset")
"""Fields of a prompt that name its data source, the first that is there."""
ACCEPTED = 1.0


@dataclass(frozen=True)
class AnswerContent:
    """What a second method reads.

    Attributes:
        response: the response's text.
        truth: what it was graded against.
        fields: the prompt's other fields, and the facts about the response."""

    response: str
    truth: Any
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class GradedAnswer:
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
        return self.reward >= ACCEPTED

    @property
    def can_be_audited(self) -> bool:
        """Whether it was graded, by a reward with a second method."""
        return self.total is not None and self.kind in AUDITED

    @property
    def stratum(self) -> Stratum:
        """The stratum of the sample that it belongs to."""
        return self.source, self.kind, self.is_accepted


Stratum = tuple[str, str, bool]
"""Data source, kind, and whether its responses are accepted."""


@dataclass(frozen=True)
class SecondVerdict:
    """What the second method says of a verdict, with the reason."""

    outcome: Outcome
    reason: str


SecondMethod = Callable[[GradedAnswer], Awaitable[SecondVerdict]]


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


class SecondMethodJudge:
    """Judges verdicts in the workers of a pool: mathematics by a second reader, programs by running
    their tests again.

    Args:
        pool: the workers.
        options: reward → its options, `rewards.options` with `rewards.answer`.
        repeats: runs of a program's tests; different verdicts leave it undecided."""

    def __init__(
        self,
        pool: RewardPool,
        options: Mapping[str, Mapping[str, Any]],
        repeats: int = REPEATS,
    ) -> None:
        self._pool, self._options, self._repeats = pool, options, repeats

    async def judge(self, answer: GradedAnswer) -> SecondVerdict:
        """Return the finding of one verdict. A response that the second method cannot read within
        its limits is undecided."""
        content = answer.load()
        fields = dict(content.fields)
        facts = {name: fields.pop(name) for name in FACTS if name in fields}
        arguments = call_fields(answer.kind, self._options, fields, facts)
        if answer.kind == "code":
            return await self._run_again(answer.is_accepted, content, arguments)
        reading_options = {
            name: arguments[name] for name in ("opened", "reading") if name in arguments
        }
        grade = await self._pool.grade(READER, content.response, content.truth, **reading_options)
        if not grade.verdict:  # out of time or memory, or a malformed truth
            return SecondVerdict("undecided", grade.reason)
        upstream, points = grade.verdict.split(",")
        return SecondVerdict(classify_verdict(answer.is_accepted, upstream, points), grade.reason)

    async def _run_again(
        self, is_accepted: bool, content: AnswerContent, arguments: Mapping[str, Any]
    ) -> SecondVerdict:
        passed: list[bool] = []
        for _ in range(self._repeats):
            grade = await self._pool.grade("code", content.response, content.truth, **arguments)
            if not grade.is_graded:
                return SecondVerdict("undecided", grade.reason)
            passed.append(grade.reward >= ACCEPTED)
            if passed[-1] != passed[0]:
                reason = f"passes in {sum(passed)} of {len(passed)} runs; {grade.reason}"
                return SecondVerdict("undecided", f"flaky: {reason}")
        reason = f"{self._repeats} runs of its tests: {grade.reason}"
        return SecondVerdict("confirmed" if passed[0] == is_accepted else "wrong", reason)


def classify_verdict(is_accepted: bool, upstream: str, points: str) -> Outcome:
    """Return what two readings say of a verdict; each is "right", "wrong" or "unsure".

    | math-verify | values at points | outcome |
    |---|---|---|
    | contradicts | contradict | wrong |
    | anything | confirm | confirmed |
    | confirms | unsure | confirmed |
    | anything else | | undecided |

    Args:
        is_accepted: the verdict.
        upstream: math-verify's reading.
        points: that of values at points."""
    verdict, contrary = ("right", "wrong") if is_accepted else ("wrong", "right")
    if points == verdict or (points == "unsure" and upstream == verdict):
        return "confirmed"
    return "wrong" if points == upstream == contrary else "undecided"


def group_by_stratum(answers: Iterable[GradedAnswer]) -> dict[Stratum, list[GradedAnswer]]:
    """Return the answers that can be audited by stratum, in the order of the strata."""
    strata: dict[Stratum, list[GradedAnswer]] = defaultdict(list)
    for answer in answers:
        if answer.can_be_audited:
            strata[answer.stratum].append(answer)
    return dict(sorted(strata.items()))


def draw_sample(
    strata: Mapping[Stratum, Sequence[GradedAnswer]], size: int, seed: int
) -> dict[Stratum, list[GradedAnswer]]:
    """Draw about as many answers of each stratum, without replacement; a small one is taken whole.

    Args:
        strata: as `group_by_stratum` returns them.
        size: how many to draw of all together.
        seed: the same seed draws the same answers.

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
    strata: Mapping[Stratum, Sequence[GradedAnswer]],
    drawn: Mapping[Stratum, Sequence[GradedAnswer]],
    findings: Mapping[str, SecondVerdict],
    source: str | None = None,
) -> ErrorRates:
    """Return the estimated errors.

    Args:
        strata: all answers.
        drawn: those that were judged.
        findings: id → finding, of each drawn one.
        source: the data source; None: all."""
    fractions: dict[bool, list[FractionEstimate]] = {False: [], True: []}
    for stratum, answers in drawn.items():
        if source in (None, stratum[0]):
            outcomes = [findings[answer.id].outcome for answer in answers]
            counts = (outcomes.count(outcome) for outcome in ("wrong", "undecided"))
            fractions[stratum[2]].append(
                sampled_fraction(len(strata[stratum]), len(answers), *counts)
            )
    rejected, accepted = (
        combined_fraction(stratum_fractions) if stratum_fractions else None
        for stratum_fractions in fractions.values()
    )
    return ErrorRates(rejected, accepted)


async def judge_all(
    answers: Iterable[GradedAnswer], judge: SecondMethod
) -> dict[str, SecondVerdict]:
    """Return id → finding of each answer; the pool limits how many are read at a time."""
    answers = list(answers)
    findings = await asyncio.gather(*(judge(answer) for answer in answers))
    return {answer.id: finding for answer, finding in zip(answers, findings, strict=True)}
