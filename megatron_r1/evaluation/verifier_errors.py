"""How often a verifier errs: wrongly rejected and wrongly accepted responses, by a second reader.

Responses are *accepted* where their reward is 1, else *rejected*. A stratum has the responses of
one data source, one kind and one of these verdicts; the sample takes about as many of each
(`draw_sample`). A second reader reads the drawn ones (`second_verdicts`). A verdict that it leaves
undecided counts as no error at the interval's lower end, as an error at the upper.

The intervals are those of `fraction_intervals`. They cover the draw, but not what both methods get
wrong alike."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.evaluation.fraction_intervals import (
    FractionEstimate,
    combined_fraction,
    sampled_fraction,
)

Outcome = Literal["confirmed", "wrong", "undecided"]
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
