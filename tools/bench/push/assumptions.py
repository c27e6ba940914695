"""The rates and latencies that the simulation of a push at scale assumes, each with its reason."""

from dataclasses import dataclass, field, fields

from megatron_r1.config import hardware

PLAN = hardware.Assumptions()
"""The assumptions of `tools/plan`."""


def _assumed(value: float, unit: str, reason: str) -> float:
    return field(default=value, metadata={"unit": unit, "reason": reason})


@dataclass(frozen=True)
class Assumptions:
    nic: float = _assumed(50e9, "B/s", "one 400 Gb/s adapter per GPU, in each direction")
    nic_efficiency: float = _assumed(
        0.885, "", "44.26 GB/s per GPU over 400 Gb/s while 64 GPUs push to 32 (prime-rl#3341)"
    )
    nvlink: float = _assumed(200e9, "B/s", "H800, in each direction (arXiv 2412.19437, 3.1)")
    nvlink_efficiency: float = _assumed(0.75, "", "as tools/plan (link_efficiency)")
    device_pack: float = _assumed(
        90e9,
        "B/s",
        "conversion, copy and `weighted_sum` touch 22 B of HBM per byte, at 0.6 of 3.35 TB/s",
    )
    host_pack: float = _assumed(
        5e9,
        "B/s",
        "copy and checksum by one core run at 7 GB/s, and a second copy",
    )
    message_seconds: float = _assumed(
        30e-6, "s", "launch and handshake of a point-to-point message (a bucket)"
    )
    round_seconds: float = _assumed(PLAN.round_seconds, "s", "launch of an all-gather")
    hop_seconds: float = _assumed(
        PLAN.hop_seconds,
        "s",
        "per hop of a ring: 10 us, and 0.5 MB of filling at the adapter's rate",
    )
    store_requests: float = _assumed(
        PLAN.store_requests,
        "1/s",
        "one TCPStore; 24,000 to 44,000 measured with 1 to 4 clients on 2 CPU cores",
    )
    store_bytes: float = _assumed(
        PLAN.store_bytes, "B/s", "out of one TCPStore, whose server is one thread"
    )
    group_seconds: float = _assumed(
        PLAN.group_seconds,
        "s",
        "to create an NCCL group, plus: 2.04 s of 8 ranks, 4.06 s of 32 (nccl#534)",
    )
    group_rank_seconds: float = _assumed(
        PLAN.group_rank_seconds, "s", "for each of its ranks (the same)"
    )
    broadcast: float = _assumed(
        1e9, "B/s", "a broadcast over all trainer ranks, 11 hops of a tree, gloo"
    )
    gpus_per_node: int = _assumed(8, "", "")  # type: ignore[assignment]


def as_table(assumptions: Assumptions) -> list[dict[str, object]]:
    """Return name, value, unit and reason of each."""
    return [
        {"name": f.name, "value": getattr(assumptions, f.name), **f.metadata}
        for f in fields(assumptions)
    ]
