"""What a run achieved: held-out scores with their uncertainty, from its metrics and samples."""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
    """The held-out answers of one step: per question, each sample's (answer, was it right)."""

    by_question: dict[str, list[tuple[Hashable, bool]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, sample: Mapping[str, Any]) -> None:
        final = sample.get("answer")
        if final is None:
            final = final_answer(str(sample.get("response", "")))
        question = str(sample.get("question", ""))
        self.by_question[question].append((str(final).strip(), is_right(sample)))

    def passed(self) -> np.ndarray:
        """[questions] float64: the fraction of each question's samples that are right."""
        return np.array([np.mean([ok for _, ok in s]) for s in self.by_question.values()])

    def majority(self) -> np.ndarray:
        """[questions] float64: whether the commonest answer is right; a tie counts by its share."""
        return np.array([majority_is_right(samples) for samples in self.by_question.values()])


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
        votes = next((k for k in line if re.fullmatch(r"eval/cons@\d+", k)), "")
        known = answers.get(step)
        found.append(
            Evaluation(
                step,
                _score(finite(line, "eval/pass@1"), known.passed() if known else None),
                _score(finite(line, votes), known.majority() if known else None),
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


def final_answer(response: str) -> str:
    """The last <answer>…</answer>, else the last \\boxed{…}, else the last line."""
    for pattern in (r"<answer>(.*?)(?:</answer>|$)", r"\\boxed\{([^{}]*)\}"):
        matches = re.findall(pattern, response, flags=re.DOTALL)
        if matches:
            return matches[-1].strip()
    lines = response.strip().splitlines()
    return lines[-1].strip() if lines else ""


def majority_is_right(samples: Sequence[tuple[Hashable, bool]]) -> float:
    """1.0 if the commonest answer is right; among tied ones, the share of them that is right."""
    counts = Counter(answer for answer, _ in samples)
    most = max(counts.values())
    right = {answer for answer, ok in samples if ok}
    tied = [answer for answer, count in counts.items() if count == most]
    return sum(answer in right for answer in tied) / len(tied)


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
