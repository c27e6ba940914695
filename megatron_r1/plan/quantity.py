"""A number of the plan with its unit and formula."""

from dataclasses import dataclass

Section = dict[str, "Quantity"]


@dataclass(frozen=True)
class Quantity:
    """A number with its unit and formula. unit: "B", "B/s", "parameters", "tokens", "FLOP",
    "FLOP/s", "s", "hours", "share" (of 1), "x" (a ratio) or "" for a count. value: None if there is
    none; the formula then gives the reason."""

    value: float | None
    unit: str
    formula: str = ""

    @property
    def number(self) -> float:
        """The value of a quantity that has one."""
        assert self.value is not None, self.formula
        return self.value

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.unit == "B":
            return scaled(self.value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
        if self.unit == "s":
            return f"{self.value:.3g} s" if self.value < 1000 else f"{self.value:,.0f} s"
        if self.unit == "hours" and self.value < 10:
            return _few_hours(self.value)
        if self.unit == "share":
            return f"{self.value:.1%}"
        if self.unit == "x":
            return f"{self.value:.2f} x"
        if self.unit in ("FLOP", "FLOP/s", "B/s"):
            return scaled(self.value, 1000, tuple(p + self.unit for p in ("", *"kMGTPEZ")))
        if self.unit == "parameters":
            return scaled(self.value, 1000, ("", "k", "M", "B", "T"))
        unit = "token" if self.unit == "tokens" and round(self.value) == 1 else self.unit
        return f"{self.value:,.0f} {unit}".rstrip()


def in_bytes(value: float | None, formula: str = "") -> Quantity:
    """Return a number of bytes as a quantity."""
    return Quantity(value, "B", formula)


def _few_hours(hours: float) -> str:
    """Format hours in the unit that leaves two digits."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.0f} minutes" if hours >= 1 / 30 else f"{hours * 3600:.3g} s"


def scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """Format in the largest of `units`, each `base` times the one before, that leaves >= 1."""
    index = 0
    while abs(value) >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    digits = 0 if index == 0 else 2
    return f"{value:,.{digits}f} {units[index]}".rstrip()
