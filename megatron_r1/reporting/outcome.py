"""What a run achieved: the held-out scores that its evaluations wrote, with their intervals."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.reporting.wording import finite

SCORES, INTERVALS = "eval/", "interval/"


@dataclass(frozen=True)
class Score:
    """A fraction of held-out questions, with its 95% interval where one was written down."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation: pass@1, the majority vote of `num_votes` and the mean length; of a
    reward model the accuracy of its scores."""

    step: int
    passed: Score | None
    majority: Score | None
    num_votes: int | None
    length: float | None
    accuracy: Score | None = None


def evaluations(lines: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations among `lines` (those with "eval/…" numbers), in order of steps.

    Lines of one step are merged, so that both files a run writes may be passed one after the other.
    """
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in lines:
        if any(key.startswith(SCORES) for key in line):
            by_step[int(finite(line, "step") or 0)].update(line)
    found = []
    for step, line in sorted(by_step.items()):
        # The majority of one answer is that answer: pass@1 again.
        votes = next((k for k in line if re.fullmatch(r"eval/cons@(\d{2,}|[2-9])", k)), "")
        found.append(
            Evaluation(
                step,
                _score(line, "eval/pass@1"),
                _score(line, votes),
                int(votes.split("@")[1]) if votes else None,
                finite(line, "eval/response_length"),
                _score(line, "eval/accuracy"),
            )
        )
    return found


def _score(line: Mapping[str, Any], key: str) -> Score | None:
    value = finite(line, key)
    if value is None:
        return None
    ends = f"{INTERVALS}{key.removeprefix(SCORES)}"
    return Score(value, finite(line, f"{ends}/low"), finite(line, f"{ends}/high"))
