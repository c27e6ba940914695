"""The audit of a verifier: its error rates, and what its errors do to advantages.

`audit_verifier` is the core of `megatron-r1 score --audit`, which reads a file, or by
`logged_responses` the sample logs of a run."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any

from r1_grading.terms import ACCURACY

from megatron_r1.controller.advantages import group_advantages
from megatron_r1.data.prompt import data_source
from megatron_r1.evaluation.estimates import Estimate, estimate_mean
from megatron_r1.evaluation.fraction_intervals import FractionEstimate, sampled_fraction
from megatron_r1.evaluation.verifier_errors import (
    AnswerContent,
    AuditedResponse,
    ErrorRates,
    SecondReader,
    SecondReaderVerdict,
    draw_sample,
    error_rates,
    group_by_stratum,
    read_second_verdicts,
)

if TYPE_CHECKING:
    from megatron_r1.controller.rollouts.rollout import GradedResponse, Group

SAMPLE_SIZE = 200
NUM_GROUPS = 25
Rewards = list[list[float | None]]
Advantages = Callable[[Rewards], list[list[float]]]
"""Groups of rewards → groups of advantages, as an algorithm's `advantages`."""


@dataclass(frozen=True)
class AdvantageEffect:
    """How far advantages move in randomly drawn groups when wrong verdicts are corrected.

    Attributes:
        num_groups: how many groups there are.
        num_drawn: how many of them were judged whole.
        mean_change: the mean of |change of the advantage| over their responses, a mean per group;
            the lower end keeps undecided verdicts, the upper end reverses them.
        sign_changes: the fraction of groups in which the sign of an advantage changes."""

    num_groups: int
    num_drawn: int
    mean_change: Estimate
    sign_changes: FractionEstimate


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        num_responses: how many can be audited.
        num_ungraded: how many could not be graded.
        without_reader: kind → how many, of kinds without a second reader.
        sources: data source → its errors.
        overall: those of all sources.
        effect: None where no group has two responses.
        judged: every judged response with the second reader's verdict."""

    num_responses: int
    num_ungraded: int
    without_reader: dict[str, int]
    sources: dict[str, ErrorRates]
    overall: ErrorRates
    effect: AdvantageEffect | None
    judged: list[tuple[AuditedResponse, SecondReaderVerdict]]

    @property
    def concerned(self) -> list[tuple[AuditedResponse, SecondReaderVerdict]]:
        """The responses whose verdict is not confirmed, the wrong ones first."""
        outcomes = ("wrong", "undecided")
        concerned_pairs = [pair for pair in self.judged if pair[1].outcome in outcomes]
        return sorted(concerned_pairs, key=lambda pair: outcomes.index(pair[1].outcome))

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with the text of each response concerned."""
        sources = {name: asdict(rates) for name, rates in self.sources.items()}
        return {
            "answers": self.num_responses,
            "ungraded": self.num_ungraded,
            "without_second_method": self.without_reader,
            "overall": asdict(self.overall),
            "sources": sources,
            "advantages": None if self.effect is None else asdict(self.effect),
            "judged": len(self.judged),
            "concerned": [_as_json(*pair) for pair in self.concerned],
        }


async def audit_verifier(
    responses: Sequence[AuditedResponse],
    second_reader: SecondReader,
    *,
    size: int = SAMPLE_SIZE,
    seed: int = 0,
    num_groups: int = NUM_GROUPS,
    advantages: Advantages | None = None,
) -> Audit:
    """Estimate a verifier's errors by a second reader on a stratified random sample.

    Args:
        responses: what it graded; each has a place of its own.
        second_reader: what reads a response again (`PooledSecondReader.read`).
        size: how many responses to draw for the error rates.
        seed: the seed of the draws.
        num_groups: how many groups to draw whole, for the effect on advantages; 0 for none.
        advantages: the algorithm's; default GRPO's z-scores.

    Raises:
        UserError: a size below the number of strata."""
    strata = group_by_stratum(responses)
    drawn_responses = draw_sample(strata, size, seed)
    groups = _auditable_groups(responses)
    drawn_groups = random.Random(f"{seed}:groups").sample(groups, min(num_groups, len(groups)))
    to_judge = [*chain.from_iterable(drawn_responses.values())]
    to_judge += [
        response for group in drawn_groups for response in group if response.can_be_audited
    ]
    distinct_responses = list({response.id: response for response in to_judge}.values())
    second_verdicts = await read_second_verdicts(distinct_responses, second_reader)
    sources = sorted({stratum[0] for stratum in strata})
    kinds_without_reader = Counter(
        response.kind
        for response in responses
        if response.total is not None and not response.can_be_audited
    )
    return Audit(
        num_responses=sum(map(len, strata.values())),
        num_ungraded=sum(response.total is None for response in responses),
        without_reader=dict(kinds_without_reader.most_common()),
        sources={
            name: error_rates(strata, drawn_responses, second_verdicts, name) for name in sources
        },
        overall=error_rates(strata, drawn_responses, second_verdicts),
        effect=_advantage_effect(
            len(groups), drawn_groups, second_verdicts, advantages or _z_scores, seed
        ),
        judged=[(response, second_verdicts[response.id]) for response in distinct_responses],
    )


def logged_responses(
    groups: Iterable[Group],
    prefix: str,
    weights: Mapping[str, float],
    reward_of: Callable[[GradedResponse], float | None] | None = None,
    thought_opened: bool = False,
) -> Iterator[AuditedResponse]:
    """Yield the responses of the finished groups of a sample log (`group_records.from_record`).

    Responses that `rewards.weights` did not grade by their own kind are left out, and so are
    episodes, which an environment grades.

    Args:
        groups: the finished groups of one step.
        prefix: what the places begin with, such as "step 7".
        weights: the weights of the terms at that step.
        reward_of: what advantages are computed of (`loop.training_reward`); default the total.
        thought_opened: whether the prompts end with `<think>`."""
    for number, group in enumerate(groups):
        prompt = group.prompt
        run_arguments = {"question": prompt.question} | (
            {"thought_opened": True} if thought_opened else {}
        )
        for index, graded_response in enumerate(group.responses):
            if ACCURACY not in graded_response.rewards or graded_response.episode is not None:
                continue
            is_graded = graded_response.is_graded and ACCURACY not in graded_response.ungraded_terms
            reward = graded_response.reward if reward_of is None else reward_of(graded_response)
            yield AuditedResponse(
                id=f"{prefix}, group {number} ({prompt.id}), response {index}",
                source=source_of(prompt.fields),
                kind=prompt.kind,
                group=f"{prefix}, group {number}",
                reward=graded_response.rewards[ACCURACY],
                total=reward if is_graded else None,
                weight=weights.get(ACCURACY, 0.0),
                load=partial(
                    AnswerContent, graded_response.text, prompt.truth, prompt.fields | run_arguments
                ),
            )


def source_of(fields: Mapping[str, Any]) -> str:
    """Return the data source that a prompt's fields name, or "-"."""
    return data_source(fields) or "-"


def _auditable_groups(responses: Iterable[AuditedResponse]) -> list[list[AuditedResponse]]:
    """Return the groups of at least two responses with one that can be audited."""
    groups: dict[str, list[AuditedResponse]] = defaultdict(list)
    for response in responses:
        if response.group is not None:
            groups[response.group].append(response)
    return [
        group
        for group in groups.values()
        if len(group) > 1 and any(response.can_be_audited for response in group)
    ]


def _advantage_effect(
    num_groups: int,
    drawn_groups: list[list[AuditedResponse]],
    second_verdicts: Mapping[str, SecondReaderVerdict],
    advantages: Advantages,
    seed: int,
) -> AdvantageEffect | None:
    if not drawn_groups:
        return None
    logged_advantages = advantages(
        [[response.total for response in group] for group in drawn_groups]
    )
    changes, signs = [], []
    for reversed_outcomes in (("wrong",), ("wrong", "undecided")):
        corrected_advantages = advantages(
            [
                [
                    _corrected_total(response, second_verdicts, reversed_outcomes)
                    for response in group
                ]
                for group in drawn_groups
            ]
        )
        pairs = [
            list(zip(*columns, strict=True))
            for columns in zip(logged_advantages, corrected_advantages, strict=True)
        ]
        # Algorithms with an advantage per token have NaN for ungraded responses, before and after.
        changes.append(
            [fmean(abs(b - a) if math.isfinite(a) else 0.0 for a, b in pair) for pair in pairs]
        )
        signs.append(sum(any(_sign_of(a) != _sign_of(b) for a, b in pair) for pair in pairs))
    certain_change, possible_change = (estimate_mean(by_group, seed) for by_group in changes)
    intervals = ((change.low, change.high) for change in (certain_change, possible_change))
    # A single group has no interval.
    ends = [end for interval in intervals for end in interval if end is not None]
    num_certain, num_possible = min(signs), max(signs)
    return AdvantageEffect(
        num_groups,
        len(drawn_groups),
        Estimate(certain_change.value, min(ends, default=None), max(ends, default=None)),
        sampled_fraction(num_groups, len(drawn_groups), num_certain, num_possible - num_certain),
    )


def _corrected_total(
    response: AuditedResponse,
    second_verdicts: Mapping[str, SecondReaderVerdict],
    outcomes: Sequence[str],
) -> float | None:
    """Return the total with the reward of the other verdict where the second reader says one of
    these outcomes."""
    second_verdict = second_verdicts.get(response.id)
    if response.total is None or second_verdict is None or second_verdict.outcome not in outcomes:
        return response.total
    reward = 0.0 if response.is_accepted else 1.0
    return response.total + response.weight * (reward - response.reward)


def _z_scores(groups: Rewards) -> list[list[float]]:
    return [group_advantages(rewards) for rewards in groups]


def _sign_of(value: float) -> int:
    return (value > 0) - (value < 0)


def _as_json(response: AuditedResponse, second_verdict: SecondReaderVerdict) -> dict[str, Any]:
    content = response.load()
    return {
        "place": response.id,
        "source": response.source,
        "kind": response.kind,
        "verdict": "accepted" if response.is_accepted else "rejected",
        "outcome": second_verdict.outcome,
        "reason": second_verdict.reason,
        "response": content.response,
        "truth": content.truth,
    }
