"""The rates and latencies that the simulation of a push at scale assumes, each with its reason."""

from typing import Annotated

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megatron_r1.config import hardware
from megatron_r1.config.hardware import ByteRate, Count, Rate

PLAN = hardware.Assumptions()
"""The assumptions of `tools/plan`."""


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True))
class PushAssumptions:
    nic: ByteRate = 50e9
    """one 400 Gb/s adapter per GPU, in each direction"""
    nic_efficiency: Annotated[float, ""] = 0.885
    """44.26 GB/s per GPU over 400 Gb/s while 64 GPUs push to 32 (prime-rl#3341)"""
    nvlink: ByteRate = 200e9
    """H800, in each direction (arXiv 2412.19437, 3.1)"""
    nvlink_efficiency: Annotated[float, ""] = 0.75
    """as tools/plan (link_efficiency)"""
    device_pack: ByteRate = 90e9
    """conversion, copy and `weighted_sum` touch 22 B of HBM per byte, at 0.6 of 3.35 TB/s"""
    host_pack: ByteRate = 5e9
    """copy and checksum by one core run at 7 GB/s, and a second copy"""
    message_seconds: Annotated[float, "s"] = 30e-6
    """launch and handshake of a point-to-point message (a bucket)"""
    round_seconds: Annotated[float, "s"] = PLAN.round_seconds
    """launch of an all-gather"""
    hop_seconds: Annotated[float, "s"] = PLAN.hop_seconds
    """per hop of a ring: 10 us, and 0.5 MB of filling at the adapter's rate"""
    store_requests: Rate = PLAN.store_requests
    """one TCPStore; 24,000 to 44,000 measured with 1 to 4 clients on 2 CPU cores"""
    store_bytes: ByteRate = PLAN.store_bytes
    """out of one TCPStore, whose server is one thread"""
    group_seconds: Annotated[float, "s"] = PLAN.group_seconds
    """to create an NCCL group, plus: 2.04 s of 8 ranks, 4.06 s of 32 (nccl#534)"""
    group_rank_seconds: Annotated[float, "s"] = PLAN.group_rank_seconds
    """for each of its ranks (the same)"""
    broadcast: ByteRate = 1e9
    """a broadcast over all trainer ranks, 11 hops of a tree, gloo"""
    gpus_per_node: Count = 8


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
