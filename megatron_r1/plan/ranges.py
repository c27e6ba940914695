"""Ranges of estimated times, and the measurements that narrow them.

A range is the estimate over and times `Assumptions.time_spread`, which is how far the plan is off
published runs (`published.py`). What `--calibrate` has measured has none."""

from dataclasses import replace

from megatron_r1.plan.between_phases import OFFLOAD
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, Section

MEASUREMENTS = {
    "rollout": "seconds of a decoding pass",
    "scoring": "seconds of a micro-batch",
    "training": "seconds of a micro-batch",
    "critic": "seconds of a micro-batch",
    "push": "seconds between phases",
    "load": "seconds between phases",
    "sleep and wake": "seconds between phases",
    "saves": "seconds between phases",
    OFFLOAD: "seconds between phases",
}
"""The check of tools/gpu_check that measures the number of a part."""
UNMEASURED = ("local_disk",)
"""Numbers that no check measures."""


def narrowing_number(job: PlannedJob, name: str) -> str | None:
    """Return the number that, measured on the hardware that is planned, closes the range of a part
    (it is solved for so that the plan takes the measured seconds); None for what has no range."""
    if name == OFFLOAD:
        to_disk = job.config.parallel.offload_between_phases == "disk"
        return "local_disk" if to_disk else "host_link"
    if name in ("scoring", "training", "optimizer step", "critic"):
        return "compute_efficiency"
    engines = "decode_latency_per_layer" if job.engine_gpus > 1 else "bandwidth_efficiency"
    numbers = {
        "rollout": engines,
        "push": "push_efficiency",
        "load": "tensor_load_seconds",
        "sleep and wake": "wake_seconds",
        "saves": "host_link" if job.config.checkpoint.asynchronous else "storage",
    }
    return numbers.get(name)


WIDE = 2.0
"""A range whose ends differ by more names the measurement that would close it."""


def with_range(job: PlannedJob, name: str, quantity: Quantity) -> Quantity:
    """Return an estimate of time with its range; others, and those without a value, as they are."""
    number = narrowing_number(job, name)
    if number is None or quantity.value is None or number in job.measured:
        return quantity
    spread = job.assumptions.time_spread
    return replace(quantity, low=quantity.value / spread, high=quantity.value * spread)


def narrowing_section(job: PlannedJob, time: Section) -> Section:
    """Return the width of each part's range beyond `WIDE`, with the measurement that closes it."""
    section: Section = {}
    for name, check in MEASUREMENTS.items():
        part = time.get(name)
        if narrowing_number(job, name) in UNMEASURED:
            continue
        if part is None or part.low is None or not part.low or part.high is None:
            continue
        if (width := part.high / part.low) > WIDE:
            section[name] = Quantity(
                width,
                "x",
                f"tools/gpu_check --only {check!r}, then --calibrate with the file that it writes: "
                f"{narrowing_number(job, name)}",
            )
    return section
