"""Compares the accuracies of a step's responses with the verdicts of two other readers of
mathematics: values at random points, and where these are not sure, math-verify."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from r1_grading.reading import Reading
from r1_grading.second_readers.answer_texts import Unsure, parse_answer, same_answer_texts
from r1_grading.terms import ACCURACY

from megatron_r1.why.checks.regraded_rewards import FAMILY, MAX_READ
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

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
SECOND_READER_KINDS = ("math", "logic")
"""Kinds whose answers the second readers read; of logic, which may have other right answers, only
those that they take for right."""


def compare_accuracies(step: RecordedStep) -> Comparison:
    """Compare accuracies with those of the second readers, of answers that responses state
    plainly."""
    name = "verdict of second readers"
    try:
        from math_verify import parse, verify
    except ImportError:
        return not_checked(FAMILY, name, "the package math-verify is not installed")
    verdict_by_texts: dict[tuple[str, str], bool] = {}

    def accepts(answer: str, truth: str) -> bool:
        key = answer.strip(), truth.strip()
        if key not in verdict_by_texts and (verdict := _same_values(*key)) is not None:
            verdict_by_texts[key] = verdict
        if key not in verdict_by_texts:
            gold, response_answer = (_parse_as_math(parse, text) for text in (key[1], key[0]))
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
        f"the accuracy of {verdicts.num_answers:,} responses with that of values at points, or "
        "else of math-verify",
        [*chain.from_iterable(verdicts.rejected_by_form.values()), *verdicts.accepted_responses],
        verdicts.num_answers,
        reason=verdicts.reason(),
        remedy=remedy,
        loss_fraction=step.loss_fraction,
        tolerance=max(MAX_DISPUTED_FRACTION, 1 / verdicts.num_answers),
        tolerance_source="readers of mathematics differ about so many",
    )


def _same_values(answer: str, truth: str) -> bool | None:
    """Return whether both have the same values at random points; None where that is not sure."""
    try:
        return same_answer_texts(parse_answer(truth), parse_answer(answer), f"{truth}\n{answer}")
    except Unsure:
        return None


def _parse_as_math(parse: Callable[..., list[Any]], text: str) -> list[Any]:
    return parse(f"${text.strip().strip('$')}$") or parse(text)


@dataclass
class _Verdicts:
    """What the second readers say of the answers that responses state.

    Attributes:
        num_answers: answers that they have read.
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
        """Return in words how many answers the run graded otherwise than the second readers: right
        ones that it rejected and wrong ones that it accepted, each with an example."""
        parts = []
        if count := sum(map(len, self.rejected_by_form.values())):
            form = max(self.rejected_by_form, key=lambda text: len(self.rejected_by_form[text]))
            parts.append(
                f"{count:,} answers are rejected that they take for right, most behind {form}, as "
                f"{self.rejected_example}"
            )
        if self.accepted_responses:
            ending = (
                ", all cut off: truncated answers are rewarded" if self.are_all_truncated else ""
            )
            parts.append(
                f"{len(self.accepted_responses):,} are accepted that they take for wrong, as "
                f"{self.accepted_example}{ending}; {self.num_rewarded:,} of {self.num_answers:,} "
                "are rewarded"
            )
        return "; ".join(parts)


def _collect_verdicts(step: RecordedStep, accepts: Callable[[str, str], bool]) -> _Verdicts:
    """Return how the accuracies of a step's responses compare with a second reader's verdicts."""
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


def read_stated_answer(text: str, reading: Reading) -> tuple[str, str] | None:
    """Return an answer and the form it is in, found without the run's reader. It is in the tag, the
    last box or ####, else, with the readings that take it, the last number. None where there is
    none, where there are several tags, and for an answer that is neither a number nor LaTeX:
    readers differ about those.

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
