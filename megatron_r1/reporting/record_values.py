"""Reads values of a run's metrics and samples, which may be missing or of another type."""

import math
import numbers
from collections.abc import Mapping
from typing import Any


def is_correct(sample: Mapping[str, Any]) -> bool:
    """Return whether a sample is right, by its accuracy reward, or by its reward without one."""
    rewards = sample.get("rewards")
    parts = rewards if isinstance(rewards, Mapping) else {}
    accuracy = finite_metric(parts, "accuracy")
    return ((finite_metric(sample, "reward") or 0.0) if accuracy is None else accuracy) >= 0.5


def prompt_question(text: Any) -> str:
    """Return the last line that is not blank: the question of a prompt in the R1-Zero template."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    question_lines = [line for line in lines if not line.startswith("Assistant:")] or lines
    return question_lines[-1].removeprefix("User: ") if question_lines else ""


def finite_metric(metrics: Mapping[str, Any], key: str) -> float | None:
    """Return the metric as a float, or None if it is missing, null, text, NaN or infinite."""
    value = metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    value = float(value)
    return value if math.isfinite(value) else None
