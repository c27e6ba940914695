"""A difference between two runs: its step and phase, its size, and whether that is rounding."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

COMPARED_PHASES = (
    "questions",
    "responses",
    "engine log-probabilities",
    "rewards",
    "training",
    "gradient",
    "update",
    "weights",
    "reference",
    "random streams",
)
"""The parts of a step that a difference can begin in, in their order."""


@dataclass(frozen=True)
class RunDifference:
    """A difference between two runs.

    Attributes:
        step: the training step.
        phase: one of `COMPARED_PHASES`.
        name: what differs: a metric, a tensor, or a response and its token.
        values: the two values, as text.
        distance: the relative distance; infinite where it has no meaning.
        is_rounding: whether the two are equal to rounding.
        place: where in a tensor: the first index that differs, and how many numbers do.
        ranks: the ranks that wrote the differing part of a tensor, in the first run and in the
            second; empty where no rank did."""

    step: int
    phase: str
    name: str
    values: tuple[str, str]
    distance: float
    is_rounding: bool = False
    place: str = ""
    ranks: tuple[Sequence[int], Sequence[int]] = ((), ())

    @property
    def order(self) -> tuple[int, int, bool, float]:
        """The key that sorts by the time at which a difference can begin; in a phase tensors come
        before the metrics of them, and the largest first."""
        return self.step, COMPARED_PHASES.index(self.phase), not self.place, -self.distance

    def as_json(self) -> dict[str, Any]:
        """Return the fields; a distance without meaning is null."""
        distance = self.distance if math.isfinite(self.distance) else None
        return asdict(self) | {"distance": distance}

    def __str__(self) -> str:
        parts = [f"step {self.step}, {self.phase}: {self.name}"]
        if self.place:
            parts.append(self.place)
        parts.append(f"{self.values[0]} and {self.values[1]}")
        if math.isfinite(self.distance):
            kind = ", rounding" if self.is_rounding else ""
            parts.append(f"distance {self.distance:.2g}{kind}")
        first, second = self.ranks
        if first:
            is_same = list(first) == list(second)
            parts.append(
                f"written by {_format_ranks(first)}"
                + ("" if is_same else f" of the first run, {_format_ranks(second)} of the second")
            )
        return "; ".join(parts)


def _format_ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
