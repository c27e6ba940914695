"""The result of a run: its held-out scores with their intervals, and a sentence."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.reporting.wording import finite, number, percent

SCORES, INTERVALS = "eval/", "interval/"

Metrics = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""


@dataclass(frozen=True)
class Score:
    """A fraction of held-out questions, with its 95% interval where one was recorded."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval as text, `66–75%`; "" without an interval."""
        if self.low is None or self.high is None:
            return ""
        return f"{100 * self.low:.0f}–{100 * self.high:.0f}%"

    def __str__(self) -> str:
        interval = f" (95% interval {self.interval})" if self.interval else ""
        return percent(self.value) + interval


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation: pass@1, the majority vote of `num_votes` and the mean length in
    tokens; of a reward model the accuracy of its scores."""

    step: int
    passed: Score | None
    majority: Score | None
    num_votes: int | None
    length: float | None
    accuracy: Score | None = None


def evaluations(lines: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """Return the evaluations among `lines` (those with "eval/…" numbers), in order of steps.

    Lines of one step are merged, so both files of a run may be passed one after the other."""
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in lines:
        if any(key.startswith(SCORES) for key in line):
            by_step[int(finite(line, "step") or 0)].update(line)
    results = []
    for step, line in sorted(by_step.items()):
        # The majority of one answer is that answer: pass@1 again.
        votes = next((k for k in line if re.fullmatch(r"eval/cons@(\d{2,}|[2-9])", k)), "")
        results.append(
            Evaluation(
                step,
                _score(line, "eval/pass@1"),
                _score(line, votes),
                int(votes.split("@")[1]) if votes else None,
                finite(line, "eval/response_length"),
                _score(line, "eval/accuracy"),
            )
        )
    return results


def outcome_sentence(metrics: Metrics, heldout: Sequence[Evaluation]) -> str:
    """Return the result of the run as one sentence with numbers."""
    if not metrics and not heldout:
        return "Nothing to report yet: metrics.jsonl is empty or missing."
    scored = [evaluation for evaluation in heldout if evaluation.passed]
    steps = f"In {num_steps(metrics):,} steps" if num_steps(metrics) != 1 else "In one step"
    if len(scored) > 1:
        if 0 < scored[-1].step < num_steps(metrics):
            steps = f"By step {scored[-1].step:,} of {num_steps(metrics):,}"
        return f"{steps}, {_change(scored[0], scored[-1])}."
    if scored:
        last = scored[0]
        text = f"At step {last.step}, held-out pass@1 is {last.passed}"
        if last.majority:
            text += f" and the majority vote of {last.num_votes} {last.majority}"
        return f"{text}."
    judged = [evaluation.accuracy for evaluation in heldout if evaluation.accuracy]
    if len(judged) > 1:
        change = _from_to(judged[0].value, judged[-1].value, percent)
        return f"{steps}, the accuracy of held-out scores {change}."
    for key, name, form in (
        ("accuracy", "accuracy on the training samples", percent),
        ("loss", "the loss", number),
    ):
        if ends := first_and_last(metrics, key):
            return f"{steps}, {name} {_from_to(*ends, form)}; nothing was evaluated held-out."
    return f"{steps}, neither accuracy nor loss was recorded."


def first_and_last(metrics: Metrics, key: str) -> tuple[float, float] | None:
    """Return the means of the first and the last tenth of a curve: single steps are noisy."""
    values = recorded(metrics, key)
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    return float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))


def recorded(metrics: Metrics, key: str) -> list[float]:
    """Return the values of a metric, without those that are missing or not finite."""
    return [value for line in metrics if (value := finite(line, key)) is not None]


def num_steps(metrics: Metrics) -> int:
    """Return the last step that any line names, 0 where none does."""
    return int(max((finite(line, "step") or 0.0 for line in metrics), default=0.0))


def _score(line: Mapping[str, Any], key: str) -> Score | None:
    value = finite(line, key)
    if value is None:
        return None
    ends = f"{INTERVALS}{key.removeprefix(SCORES)}"
    return Score(value, finite(line, f"{ends}/low"), finite(line, f"{ends}/high"))


def _change(first: Evaluation, last: Evaluation) -> str:
    assert first.passed and last.passed, "called with scored evaluations only"
    passed = _from_to(first.passed.value, last.passed.value, percent)
    text = f"held-out pass@1 {passed}"
    if first.step > 0:
        text += f" since step {first.step}"
    if first.majority and last.majority:
        voted = _from_to(first.majority.value, last.majority.value, percent)
        verb = passed.split()[0]
        text += f" and the majority vote of {last.num_votes} {voted.removeprefix(f'{verb} ')}"
    if first.length is not None and last.length is not None:
        length = _from_to(first.length, last.length, number, "grew", "shrank")
        text += f", while the mean response {length} tokens"
    return text


def _from_to(before: float, after: float, form: Any, up: str = "rose", down: str = "fell") -> str:
    if form(before) == form(after):
        return f"stayed at {form(after)}"
    return f"{up if after > before else down} from {form(before)} to {form(after)}"
