"""The reward of a response: the weighted sum of its terms, each weighted from step to step.

DeepSeek-R1 adds its rewards up (arXiv 2501.12948 v2: accuracy, format and language consistency in
the reasoning stage; preference rewards only in the last 400 of the final stage's 1,700 steps)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_r1.errors import Cause, UserError, did_you_mean
from megatron_r1.rewards import resolve
from megatron_r1.rewards.base import Grade
from megatron_r1.scalars import read_scalar

ACCURACY = "accuracy"
"""The term that each prompt's own kind of reward grades."""
DEFAULT_WEIGHTS: Mapping[str, float] = {ACCURACY: 1.0, "format": 0.1}
"""The terms that DeepSeek-R1-Zero is trained on, accuracy and format."""


@dataclass(frozen=True)
class ScheduledWeight:
    """A weight that counts from step `from_step` to `to_step`, both included.

    Steps are rollouts, from 1. to_step None: until the end of the run."""

    weight: float
    from_step: int = 1
    to_step: int | None = None

    def counts_at(self, step: int) -> bool:
        return self.from_step <= step and (self.to_step is None or step <= self.to_step)


Weights = Mapping[str, float | ScheduledWeight]


@dataclass(frozen=True)
class Reward:
    """The combined reward of one response.

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


def weights_at(weights: Weights, step: int) -> dict[str, float]:
    """Return the terms that count at `step` with their weights; a weight of 0 is graded too."""
    constant = {
        name: w if isinstance(w, ScheduledWeight) else ScheduledWeight(w)
        for name, w in weights.items()
    }
    return {name: w.weight for name, w in constant.items() if w.counts_at(step)}


def combine(grades: Mapping[str, Grade], weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> Reward:
    """Return total = Σ weight[term] · reward[term] over the weighted terms.

    A graded term without a weight is reported and does not count. Raises ValueError for a weight
    whose term was not graded."""
    if missing := sorted(weights.keys() - grades.keys()):
        raise ValueError(
            f"rewards.weights names {missing[0]!r}, which was not graded; "
            f"graded: {', '.join(sorted(grades)) or 'nothing'}"
        )
    ungraded = tuple(term for term, grade in grades.items() if not grade.is_graded)
    counted = {ACCURACY, *weights, *ungraded}
    return Reward(
        total=sum(weight * grades[term].reward for term, weight in weights.items()),
        terms={term: grade.reward for term, grade in grades.items()},
        reason="; ".join(grades[term].reason for term in grades if term in counted),
        ungraded=ungraded,
        is_graded=not any(weights.get(term) for term in ungraded),
    )


def read_weights(weights: Mapping[str, Any]) -> dict[str, float | ScheduledWeight]:
    """Parse a recipe's `rewards.weights`: term → number or {weight, from_step, to_step}.

    Raises UserError naming the term and the key for a term that is no reward, an unknown key, a
    value of the wrong type, a schedule that never counts, and weights of which none is above 0."""
    read = {name: _read_weight(f"rewards.weights.{name}", name, w) for name, w in weights.items()}
    numbers = {name: w.weight if isinstance(w, ScheduledWeight) else w for name, w in read.items()}
    if not any(number > 0 for number in numbers.values()):
        raise UserError(
            f"rewards.weights: no weight is above 0 (got {numbers}), so no response would be "
            f"rewarded; give one, such as {ACCURACY}: 1.0",
            key="rewards.weights",
            cause=Cause.EMPTY,
        )
    return read


def _read_weight(path: str, name: str, value: Any) -> float | ScheduledWeight:
    if name != ACCURACY:
        try:
            resolve(name)
        except UserError as error:
            own = f"{ACCURACY!r} is the prompt's own kind"
            suggestion = did_you_mean(name, [ACCURACY]) or ";"
            message = f"{path}: {error}{suggestion} {own}"
            raise UserError(message, key=path, cause=error.cause) from None
    if isinstance(value, ScheduledWeight):
        value = vars(value)
    if not isinstance(value, Mapping):
        return _finite(path, value)
    known = [field.name for field in fields(ScheduledWeight)]
    for key in value:
        if key not in known:
            names = ", ".join(known)
            raise UserError(
                f"{path}: unknown key {key}{did_you_mean(key, known, '{}')} ({names})",
                key=f"{path}.{key}",
                cause=Cause.UNKNOWN,
            )
    if "weight" not in value:
        raise UserError(
            f"{path}: a schedule needs its weight: {{weight: 0.1, from_step: 100}}",
            key=f"{path}.weight",
            cause=Cause.MISSING,
        )
    last = value.get("to_step")
    weight = ScheduledWeight(
        _finite(f"{path}.weight", value["weight"]),
        _step(f"{path}.from_step", value.get("from_step", 1)),
        None if last is None else _step(f"{path}.to_step", last),
    )
    if weight.to_step is not None and weight.to_step < weight.from_step:
        raise UserError(
            f"{path}: to_step {weight.to_step} is before from_step {weight.from_step}, so it "
            "would never count",
            key=f"{path}.to_step",
            cause=Cause.CONFLICT,
        )
    return weight


def _step(path: str, value: Any) -> int:
    try:
        step = read_scalar(value, [int])
        if step < 1:
            raise ValueError(f"got {value!r}")
    except ValueError as error:
        raise UserError(
            f"{path}: must be a step, 1 or later: {error}", key=path, cause=Cause.OUT_OF_RANGE
        ) from None
    return step


def _finite(path: str, value: Any) -> float:
    try:
        number = read_scalar(value, [float])
        if not math.isfinite(number):
            raise ValueError(f"must be finite, got {value}")
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; or a schedule: {{weight: 0.1, from_step: 100, to_step: 400}}",
            key=path,
            cause=Cause.MALFORMED,
        ) from None
    return float(number)
