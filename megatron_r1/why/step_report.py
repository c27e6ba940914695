"""Reports a step: the comparisons of all its checks, in order, and the first that departs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.why.comparison import FAMILIES, NOT_CHECKED, Comparison


@dataclass(frozen=True)
class DepartureCurve:
    """A departure over the position in the response, for the page.

    Attributes:
        label: what it is.
        positions: the tokens of the response.
        values: one per position."""

    label: str
    positions: Sequence[float]
    values: Sequence[float]


@dataclass
class Report:
    """The comparisons of a step, in the order of `FAMILIES`.

    Attributes:
        step: the step, from 1.
        comparisons: what was compared.
        suspicions: what "nothing departs" leaves, as sentences.
        curves: for the page."""

    step: int
    comparisons: list[Comparison] = field(default_factory=list)
    suspicions: list[str] = field(default_factory=list)
    curves: list[DepartureCurve] = field(default_factory=list)

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Add comparisons, in the order of `FAMILIES`."""
        self.comparisons = sorted(
            [*self.comparisons, *comparisons],
            key=lambda comparison: FAMILIES.index(comparison.family),
        )

    def comparison(self, family: str, name: str) -> Comparison | None:
        """Return the comparison of a quantity; None where there is none."""
        for comparison in self.comparisons:
            if (comparison.family, comparison.name) == (family, name):
                return comparison
        return None

    def insert(self, comparison: Comparison, after: str) -> None:
        """Insert a comparison behind another of its family, or at the end of its family.

        Args:
            comparison: what is inserted.
            after: the other's name."""
        if (previous_comparison := self.comparison(comparison.family, after)) is None:
            self.add([comparison])
        else:
            self.comparisons.insert(self.comparisons.index(previous_comparison) + 1, comparison)

    def replace(self, old: Comparison, new: Comparison) -> None:
        """Replace a comparison by another."""
        self.comparisons[self.comparisons.index(old)] = new

    @property
    def first_departure(self) -> Comparison | None:
        """The first quantity that departs."""
        return next((comparison for comparison in self.comparisons if comparison.differs), None)

    @property
    def all_clear(self) -> str:
        """That nothing departs, with the families in which nothing could be checked."""
        families = dict.fromkeys(comparison.family for comparison in self.comparisons)
        checked = {
            comparison.family for comparison in self.comparisons if comparison.status != NOT_CHECKED
        }
        if not (left_out := [family for family in families if family not in checked]):
            return "nothing departs"
        return (
            f"nothing departs of what could be checked, {len(checked)} of {len(families)} "
            f"families: nothing of {', '.join(left_out)} could be"
        )

    def departs_before(self, family: str) -> bool:
        """Return whether a quantity of an earlier family departs."""
        position = FAMILIES.index(family)
        return any(
            comparison.differs and FAMILIES.index(comparison.family) < position
            for comparison in self.comparisons
        )

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file that --json names."""
        first = self.first_departure
        return {
            "step": self.step,
            "first": first and first.as_json(),
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "suspicions": self.suspicions,
        }
