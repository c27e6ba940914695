"""Rewards again: by a second reader of mathematics (math-verify), by the run's own graders, and as
a sum of their terms; and the metrics that are made of them."""

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
from r1_grading import grade
from r1_grading.reading import Reading
from r1_grading.rewards import FORM_REWARDS, Grade
from r1_grading.terms import ACCURACY, RewardTerms

from megatron_r1.controller.rollouts.rollout import GradedResponse, all_responses
from megatron_r1.reporting.formatting import finite_metric, format_number
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.formulas import are_equal
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY = "rewards"
MAX_READ = 1024
"""Responses that the second reader and the graders read again."""
MAX_DISPUTED_FRACTION = 0.01
"""Share of the responses about which two readers of mathematics may differ."""
PLAIN_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?%?")
PLAIN_ANSWER = re.compile(
    r"\$?(?:[-+]?[$€£]?[\d.,]+(?:\s?/\s?\d+)?\s?%?|[ -;=?-~]*\\[ -;=?-~]*)\$?"
)
"""A number or a fraction, or one line of ASCII with a LaTeX command."""
ANSWER_TAG = "<answer>"
END_TAG = "</answer>"
BOX_COMMAND = r"\boxed"
HASHES = "####"
IN_PROCESS = ("math", "exact_match", "logic")
"""Kinds of rewards that are called here; programs run in a sandbox, and services are not asked."""
SECOND_READER_KINDS = ("math", "logic")
"""Kinds whose answers the second reader reads; of logic, which may have other right answers, only
those that it takes for right."""
REWARD_TOLERANCE = 1e-6
"""Sums of a few float64 numbers."""


def check(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of a step's rewards."""
    new_grades = _grade_again(step)
    return [
        _compare_sums(step),
        _compare_order(step, new_grades),
        _compare_with_math_verify(step),
        _compare_grades(step, new_grades),
        *_compare_metrics(step),
    ]


def _compare_sums(step: RecordedStep) -> Comparison:
    """Check that rewards are the weighted sums of their terms."""
    departing_responses: list[ResponseIndex] = []
    worst, reason = 0.0, ""
    for index, graded in step.responses.items():
        if not graded.is_graded:
            continue
        total = sum(
            step.reward_weights.get(term, 0.0) * value for term, value in graded.rewards.items()
        )
        if (gap := abs(total - graded.reward)) > REWARD_TOLERANCE:
            departing_responses.append(index)
            if gap > worst:
                worst = gap
                terms = ", ".join(f"{k} {v:g}" for k, v in graded.rewards.items())
                cut = ", of a response that is cut off" if graded.is_truncated else ""
                reason = f"reward {graded.reward:g}{cut} is not {total:g}, the sum of {terms}"
    if departing_responses and all(
        step.responses[index].is_truncated for index in departing_responses
    ):
        reason = f"{len(departing_responses):,} truncated answers are punished: {reason}"
    elif departing_responses and all(
        abs(_plain_sum(step, index) - step.responses[index].reward) <= REWARD_TOLERANCE
        for index in departing_responses
    ):
        reason = f"rewards are the sums of the terms without their weights: {reason}"
    return fraction_comparison(
        FAMILY,
        "sum of the terms",
        f"{len(step.responses):,} rewards with rewards.weights "
        + ", ".join(f"{term} {weight:g}" for term, weight in step.reward_weights.items()),
        departing_responses,
        len(step.responses),
        reason=reason,
        remedy="rewards.weights, or what changes a reward after the graders",
        loss_fraction=step.loss_fraction,
    )


def _plain_sum(step: RecordedStep, index: ResponseIndex) -> float:
    terms = step.responses[index].rewards
    return sum(value for term, value in terms.items() if step.reward_weights.get(term))


def read_stated_answer(text: str, reading: Reading) -> tuple[str, str] | None:
    """Return an answer and the form it is in, found without the run's reader: the tag, the last box
    or ####, else with the readings that take it the last number; None where there is none, or
    several tags, and for an answer that is neither a number nor LaTeX: readers differ about those.

    Args:
        text: the response.
        reading: `rewards.reading`."""
    answer = _read_stated_answer(text, reading)
    return answer if answer and PLAIN_ANSWER.fullmatch(answer[0].strip()) else None


def _read_stated_answer(text: str, reading: Reading) -> tuple[str, str] | None:
    if ANSWER_TAG in text:
        answer, end, tail = text.rpartition(ANSWER_TAG)[2].partition(END_TAG)
        is_one = text.count(ANSWER_TAG) == text.count(END_TAG) == 1 and not tail.strip()
        return (answer, ANSWER_TAG) if is_one and end else None
    if BOX_COMMAND in text:
        tail, depth = text.rpartition(BOX_COMMAND)[2], 0
        for position, character in enumerate(tail):
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return tail[1:position], BOX_COMMAND
        return None
    if HASHES in text:
        lines = text.rpartition(HASHES)[2].strip().splitlines()
        return (lines[0], HASHES) if lines else None
    if reading in ("last", "auto") and (numbers := PLAIN_NUMBER.findall(text)):
        return numbers[-1], "the last number"
    return None


@dataclass
class _Verdicts:
    """What a second reader says of the answers that responses state.

    Attributes:
        num_answers: answers that it has read.
        rejected_by_form: right answers that were graded as wrong, by the form that they are in.
        accepted_responses: wrong answers that were graded as right.
        num_rewarded: answers that were graded as right.
        are_all_truncated: whether all in `accepted_responses` are of truncated responses.
        rejected_example: one of them, with its truth.
        accepted_example: likewise."""

    num_answers: int = 0
    rejected_by_form: dict[str, list[ResponseIndex]] = field(default_factory=dict)
    accepted_responses: list[ResponseIndex] = field(default_factory=list)
    num_rewarded: int = 0
    are_all_truncated: bool = True
    rejected_example: str = ""
    accepted_example: str = ""

    def reason(self) -> str:
        """Return what departs, in words."""
        parts = []
        if count := sum(map(len, self.rejected_by_form.values())):
            form = max(
                self.rejected_by_form, key=lambda reading: len(self.rejected_by_form[reading])
            )
            parts.append(
                f"{count:,} answers are rejected that it takes for right, most behind {form}, as "
                f"{self.rejected_example}"
            )
        if self.accepted_responses:
            ending = (
                ", all cut off: truncated answers are rewarded" if self.are_all_truncated else ""
            )
            parts.append(
                f"{len(self.accepted_responses):,} are accepted that it takes for wrong, as "
                f"{self.accepted_example}{ending}; {self.num_rewarded:,} of {self.num_answers:,} "
                "are paid"
            )
        return "; ".join(parts)


def _compare_with_math_verify(step: RecordedStep) -> Comparison:
    """Compare accuracies with math-verify's, of answers that responses state plainly."""
    name = "math-verify's verdict"
    try:
        from math_verify import parse, verify
    except ImportError:
        return not_checked(FAMILY, name, "the package math-verify is not installed")
    verdict_by_texts: dict[tuple[str, str], bool] = {}

    def accepts(answer: str, truth: str) -> bool:
        key = answer.strip(), truth.strip()
        if key not in verdict_by_texts:
            gold, response_answer = (_parse(parse, text) for text in (key[1], key[0]))
            verdict_by_texts[key] = key[0] == key[1] or bool(
                gold and response_answer and verify(gold, response_answer)
            )
        return verdict_by_texts[key]

    verdicts = _collect_verdicts(step, accepts)
    if not verdicts.num_answers:
        reason = step.missing_prompts_reason or "no response to mathematics states an answer"
        return not_checked(FAMILY, name, reason)
    remedy = "the rewards' reader: rewards.reading, or the truths of data.path"
    if verdicts.rejected_by_form.get(HASHES):
        remedy = "rewards.reading: auto, or last: the reader misses ####"
    return fraction_comparison(
        FAMILY,
        name,
        f"the accuracy of {verdicts.num_answers:,} responses with math-verify's",
        [*chain.from_iterable(verdicts.rejected_by_form.values()), *verdicts.accepted_responses],
        verdicts.num_answers,
        reason=verdicts.reason(),
        remedy=remedy,
        loss_fraction=step.loss_fraction,
        tolerance=max(MAX_DISPUTED_FRACTION, 1 / verdicts.num_answers),
        source="readers of mathematics differ about so many",
    )


def _collect_verdicts(step: RecordedStep, accepts: Callable[[str, str], bool]) -> _Verdicts:
    """Return what a reader says of the responses to mathematics."""
    verdicts = _Verdicts()
    for index, graded in list(step.responses.items())[:MAX_READ]:
        prompt = step.groups[index[0]].prompt
        if (
            prompt.kind not in SECOND_READER_KINDS
            or ACCURACY not in graded.rewards
            or graded.episode
        ):
            continue
        if ACCURACY in graded.ungraded_terms or isinstance(prompt.truth, dict | list):
            continue
        stated_answer = read_stated_answer(graded.text, step.config.rewards.reading)
        if stated_answer is None:
            continue
        verdicts.num_answers += 1
        answer, form = stated_answer
        example = f"{answer.strip()[:40]!r} for {str(prompt.truth)[:40]!r}"
        is_correct = accepts(answer, str(prompt.truth))
        is_rewarded = graded.rewards[ACCURACY] >= 0.5
        verdicts.num_rewarded += is_rewarded
        if is_correct and not is_rewarded:
            verdicts.rejected_by_form.setdefault(form, []).append(index)
            verdicts.rejected_example = verdicts.rejected_example or example
        elif is_rewarded and not is_correct and prompt.kind == "math":
            verdicts.accepted_responses.append(index)
            verdicts.are_all_truncated &= graded.is_truncated
            verdicts.accepted_example = verdicts.accepted_example or example
    return verdicts


def _parse(parse: Callable[..., list[Any]], text: str) -> list[Any]:
    return parse(f"${text.strip().strip('$')}$") or parse(text)


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


Grades = Mapping[ResponseIndex, Mapping[str, Grade]]


def _grade_again(step: RecordedStep) -> dict[ResponseIndex, dict[str, Grade]]:
    """Return the grades of this version's graders with the run's settings, by response and term."""
    return asyncio.run(_grade_responses(step))


async def _grade_responses(step: RecordedStep) -> dict[ResponseIndex, dict[str, Grade]]:
    graders = RewardTerms(_Graders(), step.run_config.rewards.call_options)
    # Without the data, columns that rewards of the form read are missing.
    names = IN_PROCESS if step.missing_prompts_reason else (*IN_PROCESS, *FORM_REWARDS)
    by_response = {}
    for index, graded in list(step.responses.items())[:MAX_READ]:
        prompt = step.groups[index[0]].prompt
        kinds = {term: prompt.kind if term == ACCURACY else term for term in graded.rewards}
        terms = [term for term, kind in kinds.items() if kind in names]
        if not terms or graded.episode:
            continue
        by_response[index] = await graders.grade(
            terms,
            prompt,
            step.tokenizer.closed_thought + graded.text,
            len(graded.response.token_ids),
            step.tokenizer.opens_thought,
        )
    return by_response


def _compare_order(step: RecordedStep, new_grades: Grades) -> Comparison:
    """Check that no response has the accuracy of another one of its group.

    Args:
        step: the recorded step.
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


def _compare_grades(step: RecordedStep, new_grades: Grades) -> Comparison:
    """Check each term with the graders of this version and the run's settings.

    Args:
        step: the recorded step.
        new_grades: grades by response and term."""
    name = "graded again"
    if not new_grades:
        kinds = ", ".join((*IN_PROCESS, *FORM_REWARDS))
        why = step.missing_prompts_reason or f"only {kinds} are graded here"
        return not_checked(FAMILY, name, why)
    departures: dict[str, list[ResponseIndex]] = {}
    for index, grades in new_grades.items():
        for term, new_grade in grades.items():
            if _departs(step.responses[index], term, new_grade):
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


def _departs(graded: GradedResponse, term: str, new_grade: Grade) -> bool:
    """Return whether a term is another than was logged, or can be graded and was not."""
    if term in graded.ungraded_terms:
        return new_grade.is_graded
    return (
        not new_grade.is_graded or abs(new_grade.reward - graded.rewards[term]) > REWARD_TOLERANCE
    )


def _describe_departures(
    step: RecordedStep, new_grades: Grades, term: str, departing_responses: list[ResponseIndex]
) -> str:
    """Return in words how the grades of a term differ from those that were logged.

    Args:
        step: the step.
        new_grades: grades by response and term.
        term: the term.
        departing_responses: the responses whose grades differ."""
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


def _compare_metrics(step: RecordedStep) -> list[Comparison]:
    """Compare means over the logged responses with metrics.jsonl."""
    groups = step.groups + step.filtered_groups
    responses = all_responses(groups)
    rewards = [graded_response.reward for graded_response in responses if graded_response.is_graded]
    accuracies = [
        graded_response.rewards[ACCURACY]
        for graded_response in responses
        if ACCURACY not in graded_response.ungraded_terms
    ]
    num_equal = sum(
        are_equal(np.array([r.reward for r in group.responses if r.is_graded])) for group in groups
    )
    means = {
        "reward/mean": fmean(rewards) if rewards else 0.0,
        "accuracy": fmean(accuracies) if accuracies else 0.0,
        "response_length/mean": fmean(
            len(graded_response.response.token_ids) for graded_response in responses
        ),
        "truncated": fmean(graded_response.is_truncated for graded_response in responses),
        "groups/zero_variance": num_equal / len(groups),
    }
    gaps = {
        name: math.inf if (logged := finite_metric(step.line, name)) is None else abs(logged - mean)
        for name, mean in means.items()
        if name in step.line
    }
    subject = f"the means of {len(responses):,} responses with metrics.jsonl"
    if not gaps:
        return [not_checked(FAMILY, "metrics of the rollout", "metrics.jsonl has none")]
    worst = max(gaps, key=lambda name: gaps[name])
    is_equal = gaps[worst] <= REWARD_TOLERANCE * max(1.0, abs(means[worst]))
    return [
        Comparison(
            FAMILY,
            "metrics of the rollout",
            EQUAL if is_equal else DEPARTS,
            subject,
            gaps[worst],
            REWARD_TOLERANCE * max(1.0, abs(means[worst])),
            "sums in float64",
            f"{worst} is {_describe_logged(step, worst)} in metrics.jsonl and "
            f"{format_number(means[worst])} in the sample log: they are not of the same responses",
            remedy="metrics.jsonl or sample_log/: one of them was changed, or belongs to a run "
            "that went on from an earlier checkpoint",
        )
    ]


def _describe_logged(step: RecordedStep, name: str) -> str:
    value = finite_metric(step.line, name)
    return "not a number" if value is None else format_number(value)
