"""The trainer's state that leaves its GPU while engines sample there
(`parallel.offload_between_phases`), in bytes and seconds.

Parameters and optimizer state leave once a step and come back once, over the GPU's link to its
host and, for a disk, through the drives that a node's GPUs share. After a checkpoint, which needs
them as well, the engines get their weights a second time."""

from megatron_r1.models.memory import ParameterCounts, persistent_bytes
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity

OFFLOADED_MEMORY = "offloaded while engines sample"
"""The kind of host memory."""
OFFLOAD = "offload"
"""The part of a step."""
OFFLOADED_KINDS = ("parameters", "optimizer")


def offloads_state(job: PlannedJob) -> bool:
    """Return whether the job's parameters and optimizer state leave the GPU."""
    return job.verb == "rl" and job.config.parallel.offload_between_phases != "none"


def offloaded_bytes(job: PlannedJob, counts: ParameterCounts) -> int:
    """Return the bytes of a rank of one network that leave its GPU: 0 without the setting. Copies
    that the layers keep in FP8, and a reference on the device, stay."""
    if not offloads_state(job):
        return 0
    parts = persistent_bytes(job.config, counts, job.optimizer_shards, job.config.optimizer.moments)
    # What is no parameter, such as the routers' bias, stays.
    return sum(parts[kind] for kind in OFFLOADED_KINDS) - 4 * counts.buffers


def offloaded_host_bytes(job: PlannedJob, counts: ParameterCounts) -> dict[str, int]:
    """Return what of it a rank's host holds."""
    is_in_host_memory = job.config.parallel.offload_between_phases == "host"
    return (
        {OFFLOADED_MEMORY: offloaded_bytes(job, counts)}
        if offloads_state(job) and is_in_host_memory
        else {}
    )


def offload_disk(job: PlannedJob) -> QuantityTable:
    """Return the room that a node's local disk needs; {} where nothing waits there."""
    if not offloads_state(job) or job.config.parallel.offload_between_phases != "disk":
        return {}
    ranks = min(job.hardware.gpus_per_node, job.world_size)
    num_bytes = _most_offloaded_bytes(job)
    formula = f"parallel.offload_folder: {ranks} ranks x {byte_quantity(num_bytes)}"
    return {OFFLOADED_MEMORY: byte_quantity(ranks * num_bytes, formula)}


def offload_time(job: PlannedJob, push_seconds: float) -> QuantityTable:
    """Return the seconds of a step; {} without the setting.

    Args:
        job: the planned run, of one step's settings.
        push_seconds: those of a push, which a checkpoint repeats."""
    if not offloads_state(job):
        return {}
    num_bytes, hardware = _most_offloaded_bytes(job), job.hardware
    rate, link = hardware.host_link * job.assumptions.link_efficiency, "host_link"
    if job.config.parallel.offload_between_phases == "disk":
        disk_rate = hardware.local_disk / min(hardware.gpus_per_node, job.world_size)
        rate, link = min(rate, disk_rate), "a GPU's share of local_disk"
    interval = job.config.checkpoint.every
    transfer_seconds = 2 * num_bytes / rate
    seconds = transfer_seconds + (transfer_seconds + push_seconds) / interval
    formula = (
        f"{byte_quantity(num_bytes)} away and back / {link}, and once more with a push each "
        f"checkpoint.every={interval} steps"
    )
    return {OFFLOAD: Quantity(seconds, "s", formula)}


def _most_offloaded_bytes(job: PlannedJob) -> int:
    """Return `offloaded_bytes` of policy and critic on the pipeline rank that has most."""
    networks = [job, job.critic] if job.critic else [job]
    counts = [RankCounts(network) for network in networks]
    return max(
        sum(offloaded_bytes(n, c.rank_counts(rank)) for n, c in zip(networks, counts, strict=True))
        for rank in range(job.parallel.pipeline)
    )
