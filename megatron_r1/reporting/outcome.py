"""The outcome of a run in one sentence, with the verdict on its held-out change."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_r1.reporting.change_interval import NOT_SHOWN, change_verdict
from megatron_r1.reporting.evaluations import Evaluation, HeldoutEstimate
from megatron_r1.reporting.formatting import format_number, format_percent
from megatron_r1.reporting.record_values import finite_metric

FEW_QUESTIONS = 100
"""With fewer held-out questions the sentence has their number, and intervals."""
MetricLines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""


def outcome_sentence(metrics: MetricLines, heldout: Sequence[Evaluation]) -> str:
    """Return the result of the run as one sentence with numbers."""
    if not metrics and not heldout:
        return "Nothing to report yet: metrics.jsonl is empty or missing."
    pass_evaluations = [evaluation for evaluation in heldout if evaluation.pass_at_1]
    steps = f"In {num_steps(metrics):,} steps" if num_steps(metrics) != 1 else "In one step"
    if len(pass_evaluations) > 1:
        if 0 < pass_evaluations[-1].step < num_steps(metrics):
            steps = f"By step {pass_evaluations[-1].step:,} of {num_steps(metrics):,}"
        first, last = pass_evaluations[0], pass_evaluations[-1]
        assert first.pass_at_1 and last.pass_at_1
        verdict, interval_sentence = change_verdict(
            first.pass_at_1, last.pass_at_1, last.num_questions
        )
        change = f"{_lower_first_letter(steps)}, {_describe_change(first, last)}"
        return f"{verdict}: {change}. {interval_sentence}"
    if pass_evaluations:
        last = pass_evaluations[0]
        text = f"{NOT_SHOWN}: one evaluation only. At step {last.step}, held-out pass@1 is "
        text += f"{last.pass_at_1}{_questions_text(last)}"
        if last.majority:
            text += f" and the majority vote of {last.num_votes} {last.majority}"
        return f"{text}."
    accuracies = [evaluation.accuracy for evaluation in heldout if evaluation.accuracy]
    if len(accuracies) > 1:
        change = _from_to(accuracies[0], accuracies[-1], format_percent)
        verdict, interval_sentence = change_verdict(accuracies[0], accuracies[-1], None)
        return (
            f"{verdict}: {_lower_first_letter(steps)}, the accuracy of held-out scores {change}. "
            f"{interval_sentence}"
        )
    for key, name, form in (
        ("accuracy", "accuracy on the training samples", format_percent),
        ("loss", "the loss", format_number),
    ):
        if ends := first_and_last(metrics, key):
            verdict = f"{NOT_SHOWN}: {_lower_first_letter(steps)}" if key == "accuracy" else steps
            return f"{verdict}, {name} {_from_to(*ends, form)}; nothing was evaluated held-out."
    return f"{steps}, neither accuracy nor loss was recorded."


def first_and_last(metrics: MetricLines, key: str) -> tuple[float, float] | None:
    """Return the means of the first and the last tenth of a curve: single steps are noisy."""
    values = finite_values(metrics, key)
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    return float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))


def finite_values(metrics: MetricLines, key: str) -> list[float]:
    """Return the values of a metric, without those that are missing or not finite."""
    return [value for line in metrics if (value := finite_metric(line, key)) is not None]


def num_steps(metrics: MetricLines) -> int:
    """Return the last step that any line names, 0 where none does."""
    return int(max((finite_metric(line, "step") or 0.0 for line in metrics), default=0.0))


def _questions_text(evaluation: Evaluation) -> str:
    count = evaluation.num_questions
    return f" of {count} questions" if count and count < FEW_QUESTIONS else ""


def _lower_first_letter(text: str) -> str:
    return text[:1].lower() + text[1:]


def _describe_change(first: Evaluation, last: Evaluation) -> str:
    assert first.pass_at_1 and last.pass_at_1, "called with evaluations of pass@1 only"
    form = str if _questions_text(last) else format_percent
    pass_change = _from_to(first.pass_at_1, last.pass_at_1, form)
    text = f"held-out pass@1{_questions_text(last)} {pass_change}"
    if first.step > 0:
        text += f" since step {first.step}"
    if first.majority and last.majority:
        majority_change = _from_to(first.majority, last.majority, form)
        change = majority_change.removeprefix(f"{pass_change.split()[0]} ")
        text += f" and the majority vote of {last.num_votes} {change}"
    if first.length is not None and last.length is not None:
        length_change = _from_to(first.length, last.length, format_number, "grew", "shrank")
        text += f", while the mean response {length_change} tokens"
    return text


def _from_to(
    start: float | HeldoutEstimate,
    end: float | HeldoutEstimate,
    form: Any,
    rise_verb: str = "rose",
    fall_verb: str = "fell",
) -> str:
    first, last = (
        value.value if isinstance(value, HeldoutEstimate) else value for value in (start, end)
    )
    texts = [
        form(
            value.value if isinstance(value, HeldoutEstimate) and form is format_percent else value
        )
        for value in (start, end)
    ]
    if texts[0] == texts[1]:
        return f"stayed at {texts[0]}"
    return f"{rise_verb if last > first else fall_verb} from {texts[0]} to {texts[1]}"
