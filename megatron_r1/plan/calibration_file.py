"""Reads the file of `--calibrate`: measured numbers in place of those of `plan.hardware` and
`plan.assumptions`."""

import re
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from megatron_r1.base.errors import Cause, UserError, did_you_mean
from megatron_r1.config.yaml_text import read_sections
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.hardware import Hardware, described_fields
from megatron_r1.plan.job import Calibration

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
    values = {name: _text_to_number(value) for name, value in values.items()}
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


def _text_to_number(value: object) -> object:
    """Return a text such as 1e-06, which JSON writes and YAML 1.1 takes for a text, as a number."""
    is_number = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e[+-]?\d+", value)
    return float(str(value)) if is_number else value
