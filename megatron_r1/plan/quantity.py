"""A number of the plan with its unit and formula; assumed numbers are those of config/hardware.py,
or measured ones in their place (`--calibrate FILE`)."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.hardware import Assumptions, Hardware, described_fields, unit_of
from megatron_r1.config.yaml_text import read_sections
from megatron_r1.plan.job import Calibration, PlannedJob

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
        """Return the number with the range of an estimate, whose ends are the estimate over and
        times `spread`.

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


RELATIVE_TO = "hardware"
"""The key of a file that names the hardware whose rates its shares refer to."""
GPUS = "gpus"
"""The key of a file that says on how many GPUs its values were measured; default: on one."""


def apply_calibration(
    hardware: Hardware, assumptions: Assumptions, file: Path
) -> tuple[Hardware, Assumptions, Calibration]:
    """Return both with the values of `file`, {name: value} in YAML or JSON, and which they are.

    Args:
        hardware: the rates of the planned hardware.
        assumptions: the assumed numbers.
        file: what --calibrate names.

    Raises:
        UserError: a name that neither has, a value of the wrong type or range, or a file that was
            measured on other hardware."""
    values = read_sections(file, "--calibrate")
    names = [*described_fields(assumptions), *described_fields(hardware)]
    measured_hardware = values.pop(RELATIVE_TO, hardware.name)
    num_gpus = values.pop(GPUS, 1)
    if not isinstance(num_gpus, int) or num_gpus < 1:
        raise UserError(
            f"--calibrate {file}: {GPUS}: {num_gpus!r}: a whole number of GPUs, 1 or more",
            key="--calibrate",
            cause=Cause.MALFORMED,
        )
    if measured_hardware != hardware.name:
        raise UserError(
            f"--calibrate {file}: its values are for hardware: {measured_hardware}, and the plan "
            f"for {hardware.name}; pass --hardware {measured_hardware}, or measure there",
            key="--calibrate",
            cause=Cause.CONFLICT,
        )
    for name in values:
        if name not in names:
            suggestion = did_you_mean(name, names, "{}") or f"; there are {', '.join(names)}"
            raise UserError(
                f"--calibrate {file}: unknown name {name}{suggestion}",
                key="--calibrate",
                cause=Cause.UNKNOWN,
            )
    values = {name: _number(value) for name, value in values.items()}
    try:
        hardware_values, assumption_values = (
            {name: values[name] for name in described_fields(part) if name in values}
            for part in (hardware, assumptions)
        )
        hardware = replace(hardware, **hardware_values)
        assumptions = replace(assumptions, **assumption_values)
    except ValidationError as failure:
        error = failure.errors()[0]
        reason = error["msg"].replace("Input", "it")
        raise UserError(
            f"--calibrate {file}: {error['loc'][0]}: {error['input']!r}: {reason}",
            key="--calibrate",
            cause=Cause.MALFORMED,
        ) from None
    return hardware, assumptions, Calibration(file, frozenset(values), num_gpus)


def _number(value: object) -> object:
    """Return a text such as 1e-06, which JSON writes and YAML 1.1 takes for a text, as a number."""
    is_number = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e[+-]?\d+", value)
    return float(str(value)) if is_number else value


def assumed_section(job: PlannedJob) -> QuantityTable:
    """Return every assumed number with its source: the docstring of its field, or the file."""
    section = {}
    for part in (job.assumptions, job.hardware):
        for name, info in described_fields(part).items():
            source = " ".join((info.description or "").split())
            if name in job.calibration.names:
                source = f"measured: {job.calibration.file}"
            section[name] = Quantity(getattr(part, name), unit_of(info), source)
    return section


def round_number(value: float) -> str:
    """Return a number as text: whole from 10 on, two digits below."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
