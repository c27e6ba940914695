"""Rewards again: by a second reader of mathematics (math-verify), by the run's own graders, and as
a sum of their terms; and the metrics that are made of them."""

import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
from r1_grading import grade
from r1_grading.rewards import REGISTRY
from r1_grading.terms import ACCURACY, call_fields

from megatron_r1.commands.why.finding import (
    DEPARTS,
    EQUAL,
    Finding,
    Place,
    fraction_finding,
    not_checked,
)
from megatron_r1.commands.why.formulas import are_equal
from megatron_r1.commands.why.recorded import RecordedStep
from megatron_r1.controller.rollouts.rollout import all_responses
from megatron_r1.reporting.wording import format_number as number

FAMILY = "rewards"
MAX_READ = 1024
"""Responses that the second reader and the graders read again."""
DISPUTED = 0.01
"""Share of the responses about which two readers of mathematics may differ."""
PLAIN_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?%?")
PLAIN = re.compile(r"\$?(?:[-+]?[$€£]?[\d.,]+(?:\s?/\s?\d+)?\s?%?|[ -;=?-~]*\\[ -;=?-~]*)\$?")
"""A number or a fraction, or one line of ASCII with a LaTeX command."""
TAG, END_TAG, BOX, HASHES = "<answer>", "</answer>", r"\boxed", "####"
IN_PROCESS = ("math", "exact_match", "logic")
"""Kinds of rewards that are called here; programs run in a sandbox, and services are not asked."""
READ = ("math", "logic")
"""Kinds whose answers the second reader reads; of logic, which may have other right answers, only
those that it takes for right."""
ROUNDING = 1e-6
"""Sums of a few float64 numbers."""


def check(step: RecordedStep) -> list[Finding]:
    """Return the findings of a step's rewards."""
    return [_sums(step), _second_reader(step), _graded_again(step), *_metrics(step)]


def _sums(step: RecordedStep) -> Finding:
    """Check that rewards are the weighted sums of their terms."""
    concerned: list[Place] = []
    worst, reason = 0.0, ""
    for place, graded in step.responses.items():
        if not graded.is_graded:
            continue
        total = sum(step.weights.get(term, 0.0) * value for term, value in graded.rewards.items())
        if (gap := abs(total - graded.reward)) > ROUNDING:
            concerned.append(place)
            if gap > worst:
                worst, terms = gap, ", ".join(f"{k} {v:g}" for k, v in graded.rewards.items())
                cut = ", of a response that is cut off" if graded.truncated else ""
                reason = f"reward {graded.reward:g}{cut} is not {total:g}, the sum of {terms}"
    if concerned and all(step.responses[place].truncated for place in concerned):
        reason = f"{len(concerned):,} truncated answers are punished: {reason}"
    return fraction_finding(
        FAMILY,
        "sum of the terms",
        f"{len(step.responses):,} rewards with rewards.weights "
        + ", ".join(f"{term} {weight:g}" for term, weight in step.weights.items()),
        concerned,
        len(step.responses),
        reason=reason,
        remedy="rewards.weights, or what changes a reward after the graders",
        loss_fraction=step.loss_fraction,
    )


def stated(text: str, reading: str) -> tuple[str, str] | None:
    """Return an answer and the form it is in, found without the run's reader: the tag, the last box
    or ####, else with the readings that take it the last number; None where there is none, or
    several tags, and for an answer that is neither a number nor LaTeX: readers differ about those.

    Args:
        text: the response.
        reading: `rewards.answer`."""
    found = _stated(text, reading)
    return found if found and PLAIN.fullmatch(found[0].strip()) else None


def _stated(text: str, reading: str) -> tuple[str, str] | None:
    if TAG in text:
        answer, end, rest = text.rpartition(TAG)[2].partition(END_TAG)
        is_one = text.count(TAG) == text.count(END_TAG) == 1 and not rest.strip()
        return (answer, TAG) if is_one and end else None
    if BOX in text:
        rest, depth = text.rpartition(BOX)[2], 0
        for at, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if character == "}" and depth == 0:
                return rest[1:at], BOX
        return None
    if HASHES in text:
        lines = text.rpartition(HASHES)[2].strip().splitlines()
        return (lines[0], HASHES) if lines else None
    if reading in ("last", "auto") and (found := PLAIN_NUMBER.findall(text)):
        return found[-1], "the last number"
    return None


def _second_reader(step: RecordedStep) -> Finding:
    name = "math-verify's verdict"
    try:
        from math_verify import parse, verify
    except ImportError:
        return not_checked(FAMILY, name, "the package math-verify is not installed")
    known: dict[tuple[str, str], bool] = {}

    def is_right(answer: str, truth: str) -> bool:
        key = answer.strip(), truth.strip()
        if key not in known:
            gold, given = (_parsed(parse, text) for text in (key[1], key[0]))
            known[key] = key[0] == key[1] or bool(gold and given and verify(gold, given))
        return known[key]

    rejected: dict[str, list[Place]] = {}
    accepted: list[Place] = []
    total, example, accepted_example = 0, "", ""
    for place, graded in list(step.responses.items())[:MAX_READ]:
        prompt = step.groups[place[0]].prompt
        if prompt.kind not in READ or ACCURACY not in graded.rewards or graded.episode:
            continue
        if ACCURACY in graded.ungraded_terms or isinstance(prompt.truth, dict | list):
            continue
        found = stated(graded.text, step.config.rewards.answer)
        if found is None:
            continue
        total += 1
        answer, form = found
        says, logged = is_right(answer, str(prompt.truth)), graded.rewards[ACCURACY] >= 0.5
        if says and not logged:
            rejected.setdefault(form, []).append(place)
            example = example or f"{answer.strip()[:40]!r} for {str(prompt.truth)[:40]!r}"
        elif logged and not says and prompt.kind == "math":
            accepted.append(place)
            accepted_example = (
                accepted_example or f"{answer.strip()[:40]!r} for {str(prompt.truth)[:40]!r}"
            )
    if not total:
        why = step.prompts_missing or "no response to mathematics states an answer"
        return not_checked(FAMILY, name, why)
    all_rejected = [place for places in rejected.values() for place in places]
    parts = []
    if all_rejected:
        form = max(rejected, key=lambda each: len(rejected[each]))
        parts.append(
            f"{len(all_rejected):,} answers are rejected that it takes for right, most behind "
            f"{form}, as {example}"
        )
    if accepted:
        parts.append(
            f"{len(accepted):,} are accepted that it takes for wrong, as {accepted_example}"
        )
    remedy = "the rewards' reader: rewards.answer, or the truths of data.path"
    if rejected.get(HASHES):
        remedy = "rewards.answer: auto, or last: the reader misses ####"
    return fraction_finding(
        FAMILY,
        name,
        f"the accuracy of {total:,} responses with math-verify's",
        [*all_rejected, *accepted],
        total,
        reason="; ".join(parts),
        remedy=remedy,
        loss_fraction=step.loss_fraction,
        tolerance=max(DISPUTED, 1 / total),
        source="readers of mathematics differ about so many",
    )


def _parsed(parse: Callable[..., list[Any]], text: str) -> list[Any]:
    return parse(f"${text.strip().strip('$')}$") or parse(text)


def _graded_again(step: RecordedStep) -> Finding:
    """Check accuracies with the graders of this version and the run's settings."""
    name, options = "graded again", step.run_config.rewards.call_options
    concerned: list[Place] = []
    total, reason = 0, ""
    for place, graded in list(step.responses.items())[:MAX_READ]:
        prompt = step.groups[place[0]].prompt
        if prompt.kind not in IN_PROCESS or prompt.kind not in REGISTRY or graded.episode:
            continue
        if ACCURACY in graded.ungraded_terms or ACCURACY not in graded.rewards:
            continue
        facts: dict[str, Any] = {"num_tokens": len(graded.response.token_ids)}
        facts |= {"opened": step.text.opens_thought, "question": prompt.question}
        fields = call_fields(prompt.kind, options, prompt.fields, {})
        text = step.text.closed_thought + graded.text
        again = _call(prompt.kind, text, prompt.truth, fields, facts)
        total += 1
        if abs(again.reward - graded.rewards[ACCURACY]) > ROUNDING:
            concerned.append(place)
            was = graded.rewards[ACCURACY]
            reason = reason or f"accuracy {was:g} was logged, now {again.reward:g}: {again.reason}"
    if not total:
        why = step.prompts_missing or f"only kinds {', '.join(IN_PROCESS)} are graded here"
        return not_checked(FAMILY, name, why)
    return fraction_finding(
        FAMILY,
        name,
        f"the accuracy of {total:,} responses with this version's",
        concerned,
        total,
        reason=reason,
        remedy="rewards.options, rewards.answer, the truths of the data, or the grader's version: "
        "they are not those that graded",
        loss_fraction=step.loss_fraction,
    )


def _call(kind: str, text: str, truth: Any, fields: dict[str, Any], facts: dict[str, Any]) -> Any:
    """Call a reward with the facts that it takes."""
    try:
        return grade(kind, text, truth, **fields, **facts)
    except TypeError:
        return grade(kind, text, truth, **fields)


def _metrics(step: RecordedStep) -> list[Finding]:
    """Compare means over the logged responses with metrics.jsonl."""
    groups = step.groups + step.passed_over
    responses = all_responses(groups)
    graded = [each.reward for each in responses if each.is_graded]
    right = [each.rewards[ACCURACY] for each in responses if ACCURACY not in each.ungraded_terms]
    equal = sum(
        are_equal(np.array([r.reward for r in group.responses if r.is_graded])) for group in groups
    )
    means = {
        "reward/mean": fmean(graded) if graded else 0.0,
        "accuracy": fmean(right) if right else 0.0,
        "response_length/mean": fmean(len(each.response.token_ids) for each in responses),
        "truncated": fmean(each.truncated for each in responses),
        "groups/zero_variance": equal / len(groups),
    }
    gaps = {
        name: abs(float(step.line[name]) - mean)
        for name, mean in means.items()
        if isinstance(step.line.get(name), int | float)
    }
    compared = f"the means of {len(responses):,} responses with metrics.jsonl"
    if not gaps:
        return [not_checked(FAMILY, "metrics of the rollout", "metrics.jsonl has none")]
    worst = max(gaps, key=lambda name: gaps[name])
    is_equal = gaps[worst] <= ROUNDING * max(1.0, abs(means[worst]))
    return [
        Finding(
            FAMILY,
            "metrics of the rollout",
            EQUAL if is_equal else DEPARTS,
            compared,
            gaps[worst],
            ROUNDING * max(1.0, abs(means[worst])),
            "sums in float64",
            f"{worst} is {number(step.line[worst])} in metrics.jsonl and {number(means[worst])} in "
            "the sample log: they are not of the same responses",
            remedy="metrics.jsonl or sample_log/: one of them was changed, or belongs to a run "
            "that went on from an earlier checkpoint",
        )
    ]
