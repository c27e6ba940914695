"""Measured values in place of the assumed ones of config/hardware.py (`--calibrate FILE`)."""

import re
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.hardware import Assumptions, Hardware, fields_of, unit_of
from megatron_r1.config.yaml_text import read_sections
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, Section

RELATIVE_TO = "hardware"
"""The key of a file that names the hardware whose rates its shares refer to."""


def calibrated(
    hardware: Hardware, assumptions: Assumptions, file: Path
) -> tuple[Hardware, Assumptions, dict[str, str]]:
    """Return both with the values of `file`, {name: value} in YAML or JSON, and the file by name.

    Raises UserError for a name that neither has, a value of the wrong type or range, and a file
    that was measured on other hardware."""
    values = read_sections(file, "--calibrate")
    known = [*fields_of(assumptions), *fields_of(hardware)]
    measured_on = values.pop(RELATIVE_TO, hardware.name)
    if measured_on != hardware.name:
        raise UserError(
            f"--calibrate {file}: its values are for hardware: {measured_on}, and the plan for "
            f"{hardware.name}; pass --hardware {measured_on}, or measure there",
            key="--calibrate",
            cause=Cause.CONFLICT,
        )
    for name in values:
        if name not in known:
            near = did_you_mean(name, known, "{}") or f"; there are {', '.join(known)}"
            raise UserError(
                f"--calibrate {file}: unknown name {name}{near}",
                key="--calibrate",
                cause=Cause.UNKNOWN,
            )
    values = {name: _number(value) for name, value in values.items()}
    try:
        of_hardware, others = (
            {name: values[name] for name in fields_of(part) if name in values}
            for part in (hardware, assumptions)
        )
        hardware, assumptions = replace(hardware, **of_hardware), replace(assumptions, **others)
    except ValidationError as failure:
        error = failure.errors()[0]
        why = error["msg"].replace("Input", "it")
        raise UserError(
            f"--calibrate {file}: {error['loc'][0]}: {error['input']!r}: {why}",
            key="--calibrate",
            cause=Cause.MALFORMED,
        ) from None
    return hardware, assumptions, dict.fromkeys(values, str(file))


def _number(value: object) -> object:
    """Return a text such as 1e-06, which JSON writes and YAML 1.1 takes for a text, as a number."""
    is_number = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e[+-]?\d+", value)
    return float(str(value)) if is_number else value


def assumed_section(job: PlannedJob) -> Section:
    """Return every assumed number with its source: the docstring of its field, or the file."""
    section = {}
    for part in (job.assumptions, job.hardware):
        for name, info in fields_of(part).items():
            source = " ".join((info.description or "").split())
            if name in job.measured:
                source = f"measured: {job.measured[name]}"
            section[name] = Quantity(getattr(part, name), unit_of(info), source)
    return section
