"""`megatron-r1 compare`: where two runs part that should be equal, and what it finds: a difference,
its size, and whether it is more than rounding. `records` compares what a step wrote down,
`tensors` two checkpoints, and `verb` chooses the steps to look at and prints the answer
([compare](docs/compare.md)).

**Equal to rounding.** Sums in another order differ by rounding: relatively by the unit roundoff of
their dtype (2^-24 in float32, 2^-8 in bfloat16) times the root of the number of terms, and more
where terms cancel, as in gradients. The distance of two tensors is |a - b| / |a| in the Euclidean
norm, that of two numbers |a - b| / max(|a|, |b|), that of two log-probabilities |a - b|. Up to
`ROUNDING` it counts as rounding: 1,024 and 16 unit roundoffs, a choice for which docs/compare.md
has measurements. Texts, integers and missing values are never equal to rounding."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PHASES = (
    *("questions", "responses", "engine log-probabilities", "rewards", "training"),
    *("gradient", "update", "weights", "reference", "random streams"),
)
"""The parts of a step that a difference can begin in, in their order."""

ROUNDING = {"float32": 2.0**-14, "bfloat16": 2.0**-4}
"""The largest distance that is rounding, by the dtype that a run computes in."""


@dataclass(frozen=True)
class RunDifference:
    """A difference between two runs.

    Attributes:
        step: the training step.
        phase: one of `PHASES`.
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
        return self.step, PHASES.index(self.phase), not self.place, -self.distance

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
            same = list(first) == list(second)
            parts.append(
                f"written by {_ranks(first)}"
                + ("" if same else f" of the first run, {_ranks(second)} of the second")
            )
        return "; ".join(parts)


def relative_difference(first: float, second: float) -> float:
    """Return |a - b| / max(|a|, |b|); infinite where only one of them is finite."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    return abs(first - second) / max(abs(first), abs(second))


def is_rounding(distance: float, dtype: str) -> bool:
    """Return whether a relative distance is rounding in the dtype that the runs compute in.

    Args:
        distance: as `RunDifference.distance`.
        dtype: "float32" or "bfloat16"."""
    return distance <= ROUNDING[dtype]


def _ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
