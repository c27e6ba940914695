"""The rates and latencies that the simulation of a push at scale assumes, each with its reason."""

from typing import Annotated

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megatron_r1.config import hardware
from megatron_r1.config.hardware import ByteRate, Count

PLAN = hardware.Assumptions()
"""The assumptions of `megatron-r1 plan`."""


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True))
class PushAssumptions:
    nic: ByteRate = 50e9
    """one 400 Gb/s adapter per GPU, in each direction"""
    nic_efficiency: Annotated[float, ""] = 0.885
    """44.26 GB/s per GPU over 400 Gb/s while 64 GPUs push to 32 (prime-rl#3341)"""
    nvlink: ByteRate = 200e9
    """H800, in each direction (arXiv 2412.19437, 3.1)"""
    nvlink_efficiency: Annotated[float, ""] = 0.75
    """as megatron-r1 plan (link_efficiency)"""
    device_pack: ByteRate = 90e9
    """conversion, copy and `weighted_sum` touch 22 B of HBM per byte, at 0.6 of 3.35 TB/s"""
    message_seconds: Annotated[float, "s"] = 30e-6
    """launch and handshake of a group of a send and a receive"""
    round_seconds: Annotated[float, "s"] = PLAN.round_seconds
    """launch of an all-gather"""
    hop_seconds: Annotated[float, "s"] = PLAN.hop_seconds
    """per hop of a ring: 10 us, and 0.5 MB of filling at the adapter's rate"""
    gpus_per_node: Count = 8
    """as in all recipes"""


def as_table(assumptions: PushAssumptions) -> list[dict[str, object]]:
    """Return a row for each assumption: its name, value, unit and reason."""
    return [
        {
            "name": name,
            "value": getattr(assumptions, name),
            "unit": hardware.unit_of(info),
            "reason": info.description or "",
        }
        for name, info in hardware.fields_of(assumptions).items()
    ]
