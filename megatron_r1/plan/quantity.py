"""A number of the plan with its unit, its formula and the range of an estimate."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

QuantityTable = dict[str, "Quantity"]


@dataclass(frozen=True)
class Quantity:
    """A number with its unit and formula.

    Attributes:
        value: None if there is none; the formula then gives the reason.
        unit: "B", "B/s", "parameters", "tokens", "FLOP", "FLOP/s", "s", "hours", "share" (of 1),
            "x" (a ratio) or "" for a count.
        formula: how the value was computed, as the report shows it.
        low: the lower end of an estimate's range; None for an exact number.
        high: its upper end.
    """

    value: float | None
    unit: str
    formula: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def number(self) -> float:
        """The value of a quantity that has one."""
        assert self.value is not None, self.formula
        return self.value

    def with_spread(self, spread: float, fraction: float = 1.0) -> "Quantity":
        """Return the number with a range: from its estimated part divided by `spread` to that part
        times `spread`, each plus the exact part.

        Args:
            spread: at least 1.
            fraction: the share (0 to 1) of the number that is estimated; the rest is exact."""
        estimated = self.number * fraction
        low = self.number - estimated * (1 - 1 / spread)
        return replace(self, low=low, high=self.number + estimated * (spread - 1))

    @property
    def limits(self) -> str:
        """The range as text, or ""."""
        if self.low is None or self.high is None or self.low == self.high:
            return ""
        low, high = (str(replace(self, value=end)) for end in (self.low, self.high))
        number, _, unit = low.rpartition(" ")
        return f"{number if high.endswith(f' {unit}') else low} to {high}"

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.unit == "B":
            return _format_in_units(self.value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
        if self.unit == "s":
            return f"{self.value:.3g} s" if self.value < 1000 else f"{self.value:,.0f} s"
        if self.unit == "hours" and self.value < 10:
            return _few_hours(self.value)
        if self.unit == "share":
            return f"{self.value:.1%}"
        if self.unit == "x":
            return f"{self.value:.2f} x"
        if self.unit in ("FLOP", "FLOP/s", "B/s"):
            return _format_in_units(
                self.value, 1000, tuple(p + self.unit for p in ("", *"kMGTPEZ"))
            )
        if self.unit == "parameters":
            return _format_in_units(self.value, 1000, ("", "k", "M", "B", "T"))
        unit = "token" if self.unit == "tokens" and round(self.value) == 1 else self.unit
        return f"{self.value:,.0f} {unit}".rstrip()


def byte_quantity(value: float | None, formula: str = "") -> Quantity:
    """Return a number of bytes as a quantity."""
    return Quantity(value, "B", formula)


def sum_quantities(parts: Iterable[Quantity], formula: str) -> Quantity:
    """Return the sum of quantities of one unit, with its range."""
    parts = list(parts)
    value, low, high = map(sum, zip(*map(range_ends, parts), strict=True))
    return Quantity(value, parts[0].unit, formula, low, high)


def total_hours(step: Quantity, steps: float, formula: str) -> Quantity:
    """Return the hours of so many steps, with their range.

    Args:
        step: seconds of a step.
        steps: how many.
        formula: how the hours were computed, as the report shows it."""
    value, low, high = (end * steps / 3600 for end in range_ends(step))
    return Quantity(value, "hours", formula, low, high)


def range_ends(quantity: Quantity) -> tuple[float, float, float]:
    """Return (estimate, low, high); without a range all are equal."""
    number = quantity.number
    low, high = quantity.low, quantity.high
    return number, number if low is None else low, number if high is None else high


def round_number(value: float) -> str:
    """Return a number as text: whole from 10 on, two digits below."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def _few_hours(hours: float) -> str:
    """Format hours in the unit that leaves two digits."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 30 else f"{hours * 3600:.3g} s"


def _format_in_units(value: float, base: int, units: tuple[str, ...]) -> str:
    """Format in the largest of `units`, each `base` times the one before, that leaves >= 1."""
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    digits = 0 if index == 0 else 2
    return f"{value:,.{digits}f} {units[index]}".rstrip()
