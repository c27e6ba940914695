"""The result of a check: two values of one quantity, the tolerance, the affected responses and the
remedy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_r1.reporting.formatting import format_number as number
from megatron_r1.reporting.formatting import format_percent as percent

FAMILIES = (
    "files",
    "checkpoint",
    "sampling",
    "rewards",
    "log-probabilities",
    "schedule",
    "loss",
    "optimizer",
    "push",
)
"""Families of quantities, in the order in which data flows through a step: the first departure is
the earliest of these."""

JSON_NAMES = {
    "description": "compared",
    "tolerance_source": "source",
    "affected_responses": "concerned",
}
"""Field of `Comparison` → its key in the file of --json, where it differs: users read it."""
EQUAL, DEPARTS, NOT_CHECKED = "equal", "departs", "not checked"
ROUNDING_BY_DTYPE = {"float32": 2.0**-14, "bfloat16": 2.0**-4}
"""The largest distance that is rounding, by the dtype that a run computes in: 1,024 and 16 unit
roundoffs, a choice for which docs/compare.md has measurements."""
ResponseIndex = tuple[int, int]
"""A response: the number of its group in the step, and its number in the group."""


class CannotRecompute(Exception):
    """Why something cannot be recomputed; the message is for the user."""


@dataclass(frozen=True)
class Comparison:
    """The result of one check.

    Attributes:
        family: one of `FAMILIES`.
        name: the quantity.
        status: equal, departs, or not checked.
        description: what was compared with what, and how much of it.
        distance: between the two; NaN where it has no number.
        tolerance: the largest distance that counts as equal.
        tolerance_source: where the tolerance comes from.
        reason: what departs, with names and numbers, or why nothing was checked.
        affected_responses: the responses that depart.
        num_tokens: the affected tokens; 0 where the check is not of tokens.
        loss_fraction: the part of the sum of |advantage| that the affected responses have; NaN
            where that has no meaning.
        remedy: the setting or file to change.
        departures: how far each of the affected responses departs; (): all alike."""

    family: str
    name: str
    status: str
    description: str
    distance: float = math.nan
    tolerance: float = math.nan
    tolerance_source: str = ""
    reason: str = ""
    affected_responses: Sequence[ResponseIndex] = ()
    num_tokens: int = 0
    loss_fraction: float = math.nan
    remedy: str = ""
    departures: Sequence[float] = ()

    @property
    def differs(self) -> bool:
        """Whether the quantity departs by more than the tolerance."""
        return self.status == DEPARTS

    def as_json(self) -> dict[str, Any]:
        """Return the fields by `JSON_NAMES`; a number without meaning is null."""
        fields = asdict(self)
        return {
            JSON_NAMES.get(name, name): None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in fields.items()
        }

    def __str__(self) -> str:
        text = f"{self.family}: {self.name}"
        if self.status == NOT_CHECKED:
            return f"{text}: {self.reason}"
        if not self.differs:
            return f"{text}: {self.description}{self.distance_text}"
        parts = [f"{text}: {self.reason}{self.distance_text}"]
        if self.affected_responses:
            concerned = f"{len(self.affected_responses):,} responses"
            if self.num_tokens:
                concerned += f", {self.num_tokens:,} tokens"
            if math.isfinite(self.loss_fraction):
                concerned += f", {percent(self.loss_fraction)} of the loss by weight of advantages"
            parts.append(concerned)
        if self.remedy:
            parts.append(f"change: {self.remedy}")
        return "; ".join(parts)

    @property
    def distance_text(self) -> str:
        """The distance and its tolerance as text, "" without a distance."""
        if math.isnan(self.distance):
            return ""
        if math.isnan(self.tolerance):
            return f" (distance {number(self.distance)})"
        return f" (distance {number(self.distance)}, at most {number(self.tolerance)})"


def not_checked(family: str, name: str, reason: str, description: str = "") -> Comparison:
    """Return the comparison of a check that could not be made.

    Args:
        family: as in `Comparison`, like the others.
        name: the quantity.
        reason: why.
        description: what would be compared."""
    return Comparison(family, name, NOT_CHECKED, description, reason=reason)


def with_untried(reason: str, untried: Sequence[str]) -> str:
    """Return a reason with the causes that were not tried.

    Args:
        reason: what departs.
        untried: causes that need a whole model, which does not fit into memory."""
    if not untried:
        return reason
    return f"{reason} (not tried, as the model does not fit into memory: {', '.join(untried)})"


def fraction_comparison(
    family: str,
    name: str,
    description: str,
    affected_responses: Sequence[ResponseIndex],
    total: int,
    *,
    reason: str,
    remedy: str,
    loss_fraction: Callable[[Sequence[ResponseIndex]], float],
    tolerance: float = 0.0,
    tolerance_source: str = "exact",
    num_tokens: int = 0,
) -> Comparison:
    """Return the comparison of a check whose distance is the fraction of responses that fail it.

    Args:
        family: as in `Comparison`, like the arguments not named here.
        name: the quantity.
        description: what was compared.
        affected_responses: the responses that fail.
        total: all responses that were compared.
        reason: what departs, where one does.
        remedy: what to change.
        loss_fraction: returns the fraction of the loss of some responses.
        tolerance: the largest fraction.
        tolerance_source: where the tolerance comes from.
        num_tokens: the tokens concerned."""
    distance = len(affected_responses) / total if total else 0.0
    if distance <= tolerance:
        return Comparison(family, name, EQUAL, description, distance, tolerance, tolerance_source)
    return Comparison(
        family,
        name,
        DEPARTS,
        description,
        distance,
        tolerance,
        tolerance_source,
        reason,
        list(affected_responses),
        num_tokens,
        loss_fraction(affected_responses),
        remedy,
    )
