"""What a run achieved: held-out scores with their uncertainty, from its metrics and samples."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1.evaluation.voting import majority
from megatron_r1.reporting.wording import finite, is_right

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A fraction of held-out questions, with its 95% interval where single answers are known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation: pass@1, the majority vote of `num_votes` and the mean length."""

    step: int
    passed: Score | None
    majority: Score | None
    num_votes: int | None
    length: float | None


@dataclass
class Answers:
    """The held-out answers of one step: per question, each sample's (response, was it right)."""

    by_question: dict[str, list[tuple[str, bool]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, sample: Mapping[str, Any]) -> None:
        question = sample.get("id", sample.get("question", ""))
        right = is_right(sample)
        self.by_question[str(question)].append((str(sample.get("response", "")), right))

    def passed(self) -> np.ndarray:
        """[questions] float64: the fraction of each question's samples that are right."""
        return np.array([np.mean([ok for _, ok in s]) for s in self.by_question.values()])

    def voted(self) -> np.ndarray:
        """[questions] float64: whether the majority's answer is right, 1 or 0."""
        chosen = [
            (samples, majority([response for response, _ in samples]))
            for samples in self.by_question.values()
        ]
        return np.array([0.0 if i is None else float(samples[i][1]) for samples, i in chosen])


def evaluations(
    lines: Iterable[Mapping[str, Any]], answers: Mapping[int, Answers]
) -> list[Evaluation]:
    """The evaluations among `lines` (those with "eval/..." numbers), in order of steps.

    Lines of one step are merged, so that both files a run writes may be passed one after the other.

    A score gets an interval only where the samples of that step reproduce the recorded number, that
    is, where they are the whole evaluation and not a selection to look at.
    """
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in lines:
        scores = {key: value for key, value in line.items() if key.startswith("eval/")}
        if scores:
            by_step[int(finite(line, "step") or 0)].update(scores)
    found = []
    for step, line in sorted(by_step.items()):
        # The majority of one answer is that answer: pass@1 again.
        votes = next((k for k in line if re.fullmatch(r"eval/cons@(\d{2,}|[2-9])", k)), "")
        known = answers.get(step)
        found.append(
            Evaluation(
                step,
                _score(finite(line, "eval/pass@1"), known.passed() if known else None),
                _score(finite(line, votes), known.voted() if known else None),
                int(votes.split("@")[1]) if votes else None,
                finite(line, "eval/response_length"),
            )
        )
    return found


def collect_answers(samples: Iterable[Mapping[str, Any]]) -> dict[int, Answers]:
    """The held-out samples ("split": "eval") by step."""
    by_step: dict[int, Answers] = defaultdict(Answers)
    for sample in samples:
        if sample.get("split") == "eval":
            by_step[int(sample["step"])].add(sample)
    return dict(by_step)


def bootstrap_interval(per_question: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean, resampling whole questions.

    per_question: [questions] scores in 0…1. Questions, not samples, are what was drawn at random:
    the samples of one question are not independent.
    """
    generator = np.random.default_rng(seed)
    count = len(per_question)
    means = [per_question[generator.integers(0, count, count)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _score(recorded: float | None, per_question: np.ndarray | None) -> Score | None:
    if recorded is None:
        return None
    if per_question is None or abs(per_question.mean() - recorded) > 1e-4:
        return Score(recorded)
    return Score(recorded, *bootstrap_interval(per_question))
