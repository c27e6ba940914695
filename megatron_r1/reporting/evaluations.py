"""The held-out evaluations of a run, from the lines of its files, with 95% intervals."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.reporting.formatting import format_percent
from megatron_r1.reporting.record_values import finite_metric

EVALUATION_PREFIX, INTERVAL_PREFIX = "eval/", "interval/"


@dataclass(frozen=True)
class HeldoutEstimate:
    """A mean over held-out questions, with its 95% interval where one was recorded.

    Most are fractions: pass@1, the majority vote, accuracy. Rewards and lengths are not."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval as text, `66–75%`; "" without an interval."""
        if self.low is None or self.high is None:
            return ""
        separator = " to " if self.low < 0 else "–"  # rewards of one's own may be negative
        return f"{100 * self.low:.0f}{separator}{100 * self.high:.0f}%"

    def __str__(self) -> str:
        interval = f" (95% interval {self.interval})" if self.interval else ""
        return format_percent(self.value) + interval


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation: pass@1, the majority vote of `num_votes` and the mean length in
    tokens; of a reward model the accuracy of its scores."""

    step: int
    pass_at_1: HeldoutEstimate | None
    majority: HeldoutEstimate | None
    num_votes: int | None
    length: float | None
    accuracy: HeldoutEstimate | None = None
    num_questions: int | None = None


def merge_evaluations(lines: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """Return the evaluations among `lines` (those with "eval/…" numbers), in order of steps.

    Lines of one step are merged, so both files of a run may be passed one after the other."""
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in lines:
        if any(key.startswith(EVALUATION_PREFIX) for key in line):
            by_step[int(finite_metric(line, "step") or 0)].update(line)
    results = []
    for step, line in sorted(by_step.items()):
        # The majority of one answer is that answer: pass@1 again.
        votes = next((k for k in line if re.fullmatch(r"eval/cons@(\d{2,}|[2-9])", k)), "")
        results.append(
            Evaluation(
                step,
                _read_estimate(line, "eval/pass@1"),
                _read_estimate(line, votes),
                int(votes.split("@")[1]) if votes else None,
                finite_metric(line, "eval/response_length"),
                _read_estimate(line, "eval/accuracy"),
                int(count) if (count := finite_metric(line, "eval/questions")) else None,
            )
        )
    return results


def _read_estimate(line: Mapping[str, Any], key: str) -> HeldoutEstimate | None:
    value = finite_metric(line, key)
    if value is None:
        return None
    interval_key = f"{INTERVAL_PREFIX}{key.removeprefix(EVALUATION_PREFIX)}"
    return HeldoutEstimate(
        value,
        finite_metric(line, f"{interval_key}/low"),
        finite_metric(line, f"{interval_key}/high"),
    )
