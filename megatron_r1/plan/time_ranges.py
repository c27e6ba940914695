"""The ranges of estimated times, with the measurements that narrow them.

A range goes from the estimate divided by `Assumptions.time_spread` to the estimate times it: that
is how far the plan is off published runs (`published_calibration`). A part that `--calibrate` has
measured has no range; if fewer GPUs were measured than are planned, its communication has one."""

from megatron_r1.plan.engine_communication import NCCL
from megatron_r1.plan.expert_balancer import EXPERT_MOVES
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.offload import OFFLOAD
from megatron_r1.plan.push_costs import drafts_with_mtp
from megatron_r1.plan.quantity import Quantity, QuantityTable
from megatron_r1.plan.rollout import TENSOR_SUMS
from megatron_r1.plan.sample_traffic import ROUTED_EXPERTS
from megatron_r1.plan.step_time import LINK_PARTS, STALLS, StepTime

MEASUREMENTS = {
    "rollout": "seconds of a decoding pass",
    "logprobs": "seconds of a micro-batch",
    "training": "seconds of a micro-batch",
    "critic": "seconds of a micro-batch",
    "push": "seconds between phases",
    "load": "seconds between phases",
    "sleep and wake": "seconds between phases",
    "saves": "seconds between phases",
    OFFLOAD: "seconds between phases",
}
"""The check of tools/gpu_check that measures the number of a part."""
PREFLIGHT_PARTS = (ROUTED_EXPERTS, EXPERT_MOVES, *LINK_PARTS)
"""Parts whose number the preflight measures."""
SETUP = "set-up"
"""Seconds in which engines and trainer connect, once a run and for each replaced engine."""
UNCHECKED_MEASUREMENTS = {
    "local_disk": "fio's sequential rate of a node's drives, of all its GPUs' processes at once",
    "group_rank_seconds": "NCCL's 'Init timings' (NCCL_DEBUG=INFO) of a group / its ranks",
}
"""How to measure the numbers that no check measures."""
DRAFT_ACCEPTANCE = "draft_acceptance"
WIDE_RANGE_RATIO = 2.0
"""The upper end of a range over the lower, above which the plan names the measurement that narrows
the range."""


def narrowing_number(job: PlannedJob, name: str) -> str | None:
    """Return the number that, measured on the planned hardware, closes the range of a part.

    It is solved for so that the plan takes the measured seconds. None for what has no range."""
    if name == OFFLOAD:
        to_disk = job.config.parallel.offload_between_phases == "disk"
        return "local_disk" if to_disk else "host_link"
    if name in ("logprobs", "training", "optimizer step", "critic"):
        return "compute_efficiency"
    if name in LINK_PARTS:
        rollout = job.config.rollout
        num_ranks = {
            STALLS: job.num_gpus,
            NCCL: rollout.tensor_parallel * rollout.data_parallel,
            TENSOR_SUMS: rollout.tensor_parallel,
        }
        return "nvlink" if num_ranks[name] <= job.hardware.gpus_per_node else "network"
    engine_number = "decode_latency_per_layer" if job.engine_gpus > 1 else "bandwidth_efficiency"
    numbers = {
        "rollout": engine_number,
        ROUTED_EXPERTS: "host_network",
        EXPERT_MOVES: "host_network",
        SETUP: "group_rank_seconds",
        "push": "push_efficiency",
        "load": "tensor_load_seconds",
        "sleep and wake": "wake_seconds",
        "saves": "host_link" if job.config.checkpoint.asynchronous else "storage",
    }
    return numbers.get(name)


def with_range(times: StepTime, name: str, quantity: Quantity) -> Quantity:
    """Return an estimate of time with its range; others, and those without a value, as they are.

    Args:
        times: the times of the planned job.
        name: the part of a step, or the set-up of the push.
        quantity: its estimated seconds."""
    job = times.job
    number = narrowing_number(job, name)
    if number is None or quantity.value is None:
        return quantity
    assumed_fraction = 1.0
    if number in job.calibration.names:
        if job.calibration.num_gpus >= job.num_gpus:
            return quantity
        # Fewer GPUs than are planned do not show their communication.
        assumed_fraction = times.communication_fraction(name)
    if not assumed_fraction:
        return quantity
    return quantity.with_spread(job.assumptions.time_spread, assumed_fraction)


def narrowing_section(job: PlannedJob, parts: QuantityTable) -> QuantityTable:
    """Return the parts with a wide range: the upper end over the lower, where that is more than
    `WIDE_RANGE_RATIO`, with the measurement that narrows it. Drafts have a row of their own: their
    tokens per pass are not measured by the checks.

    Args:
        job: the planned job.
        parts: the parts of a step, of a push and of the exchange of experts."""
    section: QuantityTable = {}
    for name in (*MEASUREMENTS, *PREFLIGHT_PARTS, SETUP):
        part = parts.get(name)
        if part is None or not part.low or part.high is None:
            continue
        if (width := part.high / part.low) > WIDE_RANGE_RATIO:
            number = narrowing_number(job, name)
            section[name] = Quantity(
                width, "x", f"{_narrowing_command(job, name, number)}: {number}"
            )
    speculative = job.config.rollout.speculative
    if job.generates and drafts_with_mtp(job) and DRAFT_ACCEPTANCE not in job.calibration.names:
        command = "--calibrate-from the folder of a run that drafts; no check measures it"
        formula = f"the most tokens a pass over the least: {command}: {DRAFT_ACCEPTANCE}"
        section["drafts"] = Quantity(1 + speculative.tokens, "x", formula)
    return section


def _narrowing_command(job: PlannedJob, name: str, number: str | None) -> str:
    """Return the command that measures a part's number, with the option that gives it to the
    plan."""
    if name in PREFLIGHT_PARTS:
        return "the preflight with --preflight.calibration FILE, then --calibrate FILE"
    if number in job.calibration.names:
        # On fewer GPUs, which say little of its communication.
        return f"a run of {job.num_gpus:,} GPUs, then --calibrate-from its folder"
    if number in UNCHECKED_MEASUREMENTS:
        measurement = UNCHECKED_MEASUREMENTS[number]
        return f"no check measures it; by hand into a file for --calibrate: {measurement}"
    check = MEASUREMENTS[name]
    return f"tools/gpu_check --only {check!r}, then --calibrate with the file that it writes"
