"""The weights of a reward's terms, and how they change from step to step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from r1_grading.base.errors import Cause, UserError, did_you_mean
from r1_grading.base.values import read_scalar
from r1_grading.rewards import resolve_reward

ACCURACY = "accuracy"
"""The term that each prompt's own kind of reward grades."""
DEFAULT_WEIGHTS: Mapping[str, float] = {ACCURACY: 1.0, "format": 0.1}
"""The terms that DeepSeek-R1-Zero is trained on, accuracy and format."""


@dataclass(frozen=True)
class ScheduledWeight:
    """A weight that counts from step `from_step` to `to_step`, both included.

    Attributes:
        weight: the number by which the term's reward is multiplied.
        from_step: the first rollout at which it counts, from 1.
        to_step: the last one; None: until the end of the run."""

    weight: float
    from_step: int = 1
    to_step: int | None = None

    def counts_at(self, step: int) -> bool:
        """Return whether the weight counts at `step`; both ends are included."""
        return self.from_step <= step and (self.to_step is None or step <= self.to_step)


Weights = Mapping[str, float | ScheduledWeight]


def read_weights(weights: Mapping[str, Any]) -> dict[str, float | ScheduledWeight]:
    """Parse a recipe's `rewards.weights`.

    Args:
        weights: term → number or {weight, from_step, to_step}.

    Returns:
        The same, checked.

    Raises:
        UserError: a term that is no reward, an unknown key, a value of the wrong type, a schedule
            that never counts, or no weight above 0; it names the term and the
            key."""
    parsed_weights = {
        name: _read_weight(f"rewards.weights.{name}", name, w) for name, w in weights.items()
    }
    numbers = {
        name: w.weight if isinstance(w, ScheduledWeight) else w
        for name, w in parsed_weights.items()
    }
    if not any(number > 0 for number in numbers.values()):
        raise UserError(
            f"rewards.weights: no weight is above 0 (got {numbers}), so no response would be "
            f"rewarded; give one, such as {ACCURACY}: 1.0",
            key="rewards.weights",
            cause=Cause.EMPTY,
        )
    return parsed_weights


def _read_weight(path: str, name: str, value: Any) -> float | ScheduledWeight:
    if name != ACCURACY:
        try:
            resolve_reward(name)
        except UserError as error:
            explanation = f"{ACCURACY!r} is the prompt's own kind"
            suggestion = did_you_mean(name, [ACCURACY]) or ";"
            message = f"{path}: {error}{suggestion} {explanation}"
            raise UserError(message, key=path, cause=error.cause) from None
    if isinstance(value, ScheduledWeight):
        value = vars(value)
    if not isinstance(value, Mapping):
        return _read_finite(path, value)
    keys = [field.name for field in fields(ScheduledWeight)]
    for key in value:
        if key not in keys:
            names = ", ".join(keys)
            raise UserError(
                f"{path}: unknown key {key}{did_you_mean(key, keys, '{}')} ({names})",
                key=f"{path}.{key}",
                cause=Cause.UNKNOWN,
            )
    if "weight" not in value:
        raise UserError(
            f"{path}: a schedule needs its weight: {{weight: 0.1, from_step: 100}}",
            key=f"{path}.weight",
            cause=Cause.MISSING,
        )
    last_step = value.get("to_step")
    weight = ScheduledWeight(
        _read_finite(f"{path}.weight", value["weight"]),
        _read_step(f"{path}.from_step", value.get("from_step", 1)),
        None if last_step is None else _read_step(f"{path}.to_step", last_step),
    )
    if weight.to_step is not None and weight.to_step < weight.from_step:
        raise UserError(
            f"{path}: to_step {weight.to_step} is before from_step {weight.from_step}, so it "
            "would never count",
            key=f"{path}.to_step",
            cause=Cause.CONFLICT,
        )
    return weight


def _read_step(path: str, value: Any) -> int:
    try:
        step = read_scalar(value, [int])
        if step < 1:
            raise ValueError(f"got {value!r}")
    except ValueError as error:
        raise UserError(
            f"{path}: must be a step, 1 or later: {error}", key=path, cause=Cause.OUT_OF_RANGE
        ) from None
    return step


def _read_finite(path: str, value: Any) -> float:
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


def weights_at(weights: Weights, step: int) -> dict[str, float]:
    """Return the terms that count at `step` with their weights; a weight of 0 is graded too."""
    scheduled_weights = {
        name: w if isinstance(w, ScheduledWeight) else ScheduledWeight(w)
        for name, w in weights.items()
    }
    return {name: w.weight for name, w in scheduled_weights.items() if w.counts_at(step)}
