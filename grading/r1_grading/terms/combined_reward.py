"""The reward of a response: the weighted sum of its terms, and when two rewards count as equal.

DeepSeek-R1 adds its rewards up (arXiv 2501.12948 v2: accuracy, format and language consistency in
the reasoning stage; preference rewards only in the last 400 of the final stage's 1,700 steps)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1_grading.rewards import Grade
from r1_grading.terms.weights import ACCURACY, DEFAULT_WEIGHTS


@dataclass(frozen=True)
class Reward:
    """The combined reward of one response.

    Attributes:
        total: the weighted sum, which the policy is trained on.
        terms: each term's reward, in [0, 1]; that of an environment, or of a function written for
            verl or TRL, may be any finite number.
        reason: the terms' reasons, in one line.
        ungraded: the terms whose reward function raised.
        is_graded: False if an ungraded term has a weight, so that the total does not measure the
            response."""

    total: float
    terms: dict[str, float]
    reason: str
    ungraded: tuple[str, ...] = ()
    is_graded: bool = True


def combine(grades: Mapping[str, Grade], weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> Reward:
    """Return total = Σ weight[term] · reward[term] over the weighted terms.

    Args:
        grades: term → grade. A graded term without a weight is reported and does not count.
        weights: term → weight.

    Returns:
        The sum, with each term's reward and the reasons.

    Raises:
        ValueError: a weight whose term was not graded."""
    if missing_terms := sorted(weights.keys() - grades.keys()):
        raise ValueError(
            f"rewards.weights names {missing_terms[0]!r}, which was not graded; "
            f"graded: {', '.join(sorted(grades)) or 'nothing'}"
        )
    ungraded_terms = tuple(term for term, grade in grades.items() if not grade.is_graded)
    counted_terms = {ACCURACY, *weights, *ungraded_terms}
    return Reward(
        total=sum(weight * grades[term].reward for term, weight in weights.items()),
        terms={term: grade.reward for term, grade in grades.items()},
        reason="; ".join(grades[term].reason for term in grades if term in counted_terms),
        ungraded=ungraded_terms,
        is_graded=not any(weights.get(term) for term in ungraded_terms),
    )


EQUAL_RTOL = 2.0**-22
"""Of the larger of two rewards: two units in the last place of a float32, which a reward model or
a user's function may have computed in."""


EQUAL_ATOL = 1e-12
"""Where terms of opposite sign cancel, what is left of rewards of order 1."""


def rewards_equal(rewards: Sequence[float]) -> bool:
    """Return whether all of `rewards` are the same but for rounding; True for none and for one."""
    if not rewards:
        return True
    return math.isclose(min(rewards), max(rewards), rel_tol=EQUAL_RTOL, abs_tol=EQUAL_ATOL)


def compare_rewards(first: float, second: float) -> int:
    """Return -1 if `first` is smaller, 1 if it is larger, 0 if both are equal but for rounding."""
    return 0 if rewards_equal((first, second)) else -1 if first < second else 1
