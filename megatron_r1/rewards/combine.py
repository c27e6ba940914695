"""One number per sample: the weighted sum of its named reward terms."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1.rewards.base import Grade

# DeepSeek-R1: accuracy and format, the rules R1-Zero is trained on.
DEFAULT_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 0.1}


@dataclass(frozen=True)
class Reward:
    """total: weighted sum, what the policy is trained on. terms: each reward alone, in [0, 1].
    reason: the terms' reasons, one line."""

    total: float
    terms: dict[str, float]
    reason: str


def combine(grades: Mapping[str, Grade], weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> Reward:
    """total = Σ weight[term] · reward[term] over the weighted terms.

    A term that was graded but has no weight is reported and not counted. Raises ValueError for a
    weight whose term was not graded.
    """
    if missing := sorted(weights.keys() - grades.keys()):
        raise ValueError(
            f"rewards.weights names {missing[0]!r}, which was not graded; "
            f"graded: {', '.join(sorted(grades)) or 'nothing'}"
        )
    return Reward(
        total=sum(weight * grades[term].reward for term, weight in weights.items()),
        terms={term: grade.reward for term, grade in grades.items()},
        reason="; ".join(grade.reason for grade in grades.values()),
    )
