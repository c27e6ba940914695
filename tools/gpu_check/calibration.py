"""The file of measured numbers that checks of seconds write together, for `megatron-r1 plan RECIPE
--calibrate FILE`."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_r1.base.files import atomic_write
from megatron_r1.config.hardware import HARDWARE
from megatron_r1.plan.quantity import RELATIVE_TO
from tools.gpu_check.miniatures import device_kind
from tools.gpu_check.verdict import Impossible

FILE = "calibration.yaml"
STANDS_FOR = "H800"
"""The hardware whose rates stand in the formulas where there is no GPU; nothing is written then."""


def hardware_name() -> str:
    """Return the planner's name of GPU 0.

    Raises:
        Impossible: the planner lacks the rates of this GPU.
    """
    import torch

    if device_kind() != "gpu":
        return STANDS_FOR
    device = torch.cuda.get_device_name(0)
    found = [name for name in HARDWARE if name in device.replace("-", " ").split()]
    if not found:
        known = ", ".join(HARDWARE)
        raise Impossible(f"{device} is not one of {known}, whose rates the planner has")
    return found[0]


def add_values(folder: Path, name: str, values: Mapping[str, float]) -> Path:
    """Write values next to those that other checks have written for the same hardware.

    Args:
        folder: the folder of results.
        name: the planner's name of the hardware.
        values: numbers of `Hardware` and `Assumptions`, by name."""
    file = folder / FILE
    known = yaml.safe_load(file.read_text()) if file.exists() else {}
    if known.get(RELATIVE_TO) != name:
        known = {RELATIVE_TO: name}
    title = "# Measured by tools/gpu_check; for megatron-r1 plan --calibrate\n"
    return atomic_write(file, title + yaml.safe_dump(known | dict(values), sort_keys=False))
