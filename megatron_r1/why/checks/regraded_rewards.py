"""Compares rewards of a step's responses with those that this version's graders give again."""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import chain

from r1_grading import RewardPool, grade
from r1_grading.rewards import GRADERS, RESPONSE_ONLY_REWARDS, REWARD_KINDS, Grade
from r1_grading.terms import ACCURACY, RewardTerms

from megatron_r1.controller.rollouts.rollout import GradedResponse
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY = "rewards"
MAX_READ = 1024
"""Responses that the second reader and the graders read again."""
IN_PROCESS_REWARDS = tuple(
    name
    for name in GRADERS
    if name not in RESPONSE_ONLY_REWARDS and not REWARD_KINDS[name].runs_programs
)
"""Kinds of rewards that are called here; services are not asked."""
PROGRAMS, MAX_PROGRAMS, MAX_RUNS = "code", 64, 3
"""The kind whose responses are programs; how many of them run again, in workers; and how often one
runs whose result is not the logged one: it may come out by chance."""
REWARD_TOLERANCE = 1e-6
"""Sums of a few float64 numbers."""
Grades = Mapping[ResponseIndex, Mapping[str, Grade]]


def grade_again(step: RecordedStep) -> dict[ResponseIndex, dict[str, Grade]]:
    """Return the grades of this version's graders with the run's settings, by response and term."""
    return asyncio.run(_grade_responses(step))


def compare_reward_order(step: RecordedStep, new_grades: Grades) -> Comparison:
    """Check that no response has the accuracy of another one of its group.

    Args:
        step: what the run recorded of it.
        new_grades: grades by response and term."""
    name, by_shift = "order of the rewards", dict[int, list[ResponseIndex]]()
    accuracies = {
        index: grades[ACCURACY].reward
        for index, grades in new_grades.items()
        if ACCURACY in grades and ACCURACY not in step.responses[index].ungraded_terms
    }
    groups = [
        (group_index, len(group.responses))
        for group_index, group in enumerate(step.groups)
        if all((group_index, index) in accuracies for index in range(len(group.responses)))
    ]
    largest = max((size for _, size in groups), default=0)
    if largest < 2:
        return not_checked(FAMILY, name, "no group of several responses is graded here")
    for shift in range(largest):
        by_shift[shift] = [
            (group_index, index)
            for group_index, size in groups
            for index in range(size)
            if abs(
                step.responses[group_index, index].rewards[ACCURACY]
                - accuracies[group_index, (index + shift) % size]
            )
            > REWARD_TOLERANCE
        ]
    shift = min(by_shift, key=lambda offset: (len(by_shift[offset]), offset))
    is_other = shift and not by_shift[shift]
    return fraction_comparison(
        FAMILY,
        name,
        f"the accuracies of {len(groups):,} groups with those of other responses of the group",
        by_shift[0] if is_other else [],
        len(step.responses),
        reason=f"each response has the accuracy of another response, {shift} places on in its "
        "group",
        remedy="what assigns grades to responses (controller/rollouts): an order of its own",
        loss_fraction=step.loss_fraction,
    )


def compare_regraded_rewards(step: RecordedStep, new_grades: Grades) -> Comparison:
    """Check each term with the graders of this version and the run's settings.

    Args:
        step: what the run recorded of it.
        new_grades: grades by response and term."""
    name = "graded again"
    if not new_grades:
        kinds = ", ".join((*IN_PROCESS_REWARDS, PROGRAMS, *RESPONSE_ONLY_REWARDS))
        why = step.missing_prompts_reason or f"only {kinds} are graded here"
        return not_checked(FAMILY, name, why)
    departures: dict[str, list[ResponseIndex]] = {}
    for index, grades in new_grades.items():
        for term, new_grade in grades.items():
            if _is_departing_grade(step.responses[index], term, new_grade):
                departures.setdefault(term, []).append(index)
    departing_responses = dict.fromkeys(chain.from_iterable(departures.values()))
    reason, remedy = "", ""
    if departures:
        term = max(departures, key=lambda name: (len(departures[name]), name == ACCURACY))
        reason = _describe_departures(step, new_grades, term, departures[term])
        other_terms = [
            f"{len(departures[name]):,} of {name}" for name in departures if name != term
        ]
        reason += f"; and {', '.join(other_terms)}" if other_terms else ""
        remedy = (
            "rewards.options, rewards.reading, the truths of the data, or the grader's version: "
            "they are not those that graded"
            if term == ACCURACY
            else f"the term {term}: rewards.options.{term}, or what changes it after the graders"
        )
    terms = ", ".join(dict.fromkeys(chain.from_iterable(new_grades.values())))
    return fraction_comparison(
        FAMILY,
        name,
        f"{terms} of {len(new_grades):,} responses with this version's",
        list(departing_responses),
        len(new_grades),
        reason=reason,
        remedy=remedy,
        loss_fraction=step.loss_fraction,
    )


def _is_departing_grade(graded: GradedResponse, term: str, new_grade: Grade) -> bool:
    """Return whether a term is another than was logged, or can be graded and was not."""
    if term in graded.ungraded_terms:
        return new_grade.is_graded
    return (
        not new_grade.is_graded or abs(new_grade.reward - graded.rewards[term]) > REWARD_TOLERANCE
    )


def _describe_departures(
    step: RecordedStep, new_grades: Grades, term: str, departing_responses: list[ResponseIndex]
) -> str:
    """Return in words how the grades of a term differ from those that were logged."""
    first = departing_responses[0]
    logged_reward, new_grade = step.responses[first].rewards[term], new_grades[first][term]
    ungraded_responses = [
        index for index in departing_responses if term in step.responses[index].ungraded_terms
    ]
    if len(ungraded_responses) == len(departing_responses):
        return (
            f"{len(departing_responses):,} responses are marked ungraded, though their {term} can "
            f"be graded: {new_grade.reward:g}, {new_grade.reason}"
        )
    text = f"{term} {logged_reward:g} was logged, now {new_grade.reward:g}: {new_grade.reason}"
    if all(step.responses[index].is_truncated for index in departing_responses):
        participle = "rewarded" if logged_reward > new_grade.reward else "punished"
        return (
            f"{len(departing_responses):,} truncated answers, cut off at the limit, are "
            f"{participle}: {text}"
        )
    return text


async def _grade_responses(step: RecordedStep) -> dict[ResponseIndex, dict[str, Grade]]:
    graders = RewardTerms(_Graders(), step.run_config.rewards.call_options)
    # Without the data, columns that rewards of the form read are missing.
    names = (
        IN_PROCESS_REWARDS
        if step.missing_prompts_reason
        else (*IN_PROCESS_REWARDS, *RESPONSE_ONLY_REWARDS)
    )
    by_response: dict[ResponseIndex, dict[str, Grade]] = {}
    programs = []
    for index, graded in list(step.responses.items())[:MAX_READ]:
        prompt = step.groups[index[0]].prompt
        kinds = {term: prompt.kind if term == ACCURACY else term for term in graded.rewards}
        terms = [term for term, kind in kinds.items() if kind in names]
        if graded.episode:
            continue
        if kinds.get(ACCURACY) == PROGRAMS:
            programs.append(index)
        if terms:
            by_response[index] = {**await _regrade_response(step, index, graders, terms)}
    for index, new_grade in (await _run_programs(step, programs[:MAX_PROGRAMS])).items():
        by_response.setdefault(index, {})[ACCURACY] = new_grade
    return by_response


async def _run_programs(
    step: RecordedStep, responses: Sequence[ResponseIndex]
) -> dict[ResponseIndex, Grade]:
    """Return the grades of programs whose tests run again; without those that cannot be run here,
    and those that come out otherwise from run to run."""
    if not responses:
        return {}
    settings = step.run_config.rewards
    async with RewardPool(2, settings.timeout_seconds, settings.memory_bytes) as pool:
        graders = RewardTerms(pool, settings.call_options)
        new_grades = await asyncio.gather(
            *(_run_program(step, index, graders) for index in responses)
        )
    return {
        index: new_grade
        for index, new_grade in zip(responses, new_grades, strict=True)
        if new_grade is not None
    }


async def _run_program(
    step: RecordedStep, index: ResponseIndex, graders: RewardTerms
) -> Grade | None:
    """Return the grade of a program, as of `_run_programs`; None for one that is left out."""
    for run in range(MAX_RUNS):
        new_grade = (await _regrade_response(step, index, graders, [ACCURACY]))[ACCURACY]
        departs = _is_departing_grade(step.responses[index], ACCURACY, new_grade)
        if not new_grade.is_graded or (run and not departs):
            return None
        if not departs:
            return new_grade
    return new_grade


async def _regrade_response(
    step: RecordedStep, index: ResponseIndex, graders: RewardTerms, terms: Sequence[str]
) -> Mapping[str, Grade]:
    graded = step.responses[index]
    return await graders.grade(
        terms,
        step.groups[index[0]].prompt,
        step.tokenizer.closed_thought + graded.text,
        len(graded.response.token_ids),
        step.tokenizer.opens_thought,
    )


class _Graders:
    """Grades in this process, for `RewardTerms`."""

    async def grade(self, kind: str, response: str, truth: object, /, **fields: object) -> Grade:
        """Return the grade of a response by a reward; ungraded where the reward raises.

        Args:
            kind: the reward's name.
            response: the text.
            truth: the question's truth.
            **fields: the row's other columns, options, and facts of the response."""
        try:
            return grade(kind, response, truth, **fields)
        except Exception as error:  # noqa: BLE001 - a reward may raise anything
            return Grade.ungraded(error)
