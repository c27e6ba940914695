"""The result of every reward: a number and the reason for it."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

MAX_REASON_CHARS = 500
UNGRADED = "cannot be graded"
"""The start of the reason of a grade that is none (`Grade.ungraded`)."""


@dataclass(frozen=True)
class Grade:
    """One reward's result for one response.

    reward: a number within `limits`, from 0 to 1. reason: one line for a person who audits the
    sample, cut to 500 characters. is_graded: False where the reward itself failed, so that its 0
    does not measure the response. verdict: the result by name, where the caller needs more than the
    number, such as the filter that objected. missing: the fields for want of which the reward
    could not be called. Raises ValueError for a reward outside the limits, and for NaN."""

    limits: ClassVar[tuple[float, float]] = 0.0, 1.0
    """The smallest and the largest reward; `FiniteGrade` has wider ones."""

    reward: float
    reason: str
    is_graded: bool = True
    verdict: str = ""
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.reward, str) or self.reward is None:
            raise ValueError(f"the reward must be a number, got {self.reward!r}")
        lowest, highest = self.limits
        if not lowest <= self.reward <= highest:
            raise ValueError(
                f"reward must be between {lowest:g} and {highest:g}, got {self.reward!r} "
                f"({self.reason})"
            )
        object.__setattr__(self, "reward", float(self.reward))
        object.__setattr__(self, "reason", shorten(self.reason, MAX_REASON_CHARS))

    @classmethod
    def ungraded(cls, fault: object, missing: tuple[str, ...] = ()) -> "Grade":
        """Return the grade of a response that the reward could not grade because of `fault`."""
        return cls(0.0, f"{UNGRADED}: {fault}", is_graded=False, missing=missing)


class FiniteGrade(Grade):
    """The grade of a user's environment, or of a function written for verl or TRL, whose reward may
    be any finite number."""

    limits = (-sys.float_info.max, sys.float_info.max)


def shorten(text: object, max_chars: int = 80) -> str:
    """Return `text` as one line of at most `max_chars` characters, cut with an ellipsis."""
    try:
        text = str(text)
    except ValueError:  # an integer of more than 4,300 digits, or a list with one
        text = f"a {type(text).__name__} with more than 4,300 digits"
    # Cut before splitting: the text may be megabytes of model output.
    line = " ".join(text[: max_chars + 1].split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def find_non_finite(value: object, path: str) -> str:
    """Return "truth.result is NaN" for a number in `value` that JSON does not have, or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {'NaN' if math.isnan(value) else 'Infinity'}, which is no JSON number"
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return next(filter(None, (find_non_finite(item, f"{path}.{key}") for key, item in items)), "")
