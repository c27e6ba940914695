"""What happens between the phases of a step, in bytes and seconds: engines load pushed weights,
sleep and wake, the trainer saves checkpoints, and `parallel.offload_between_phases` frees a
trainer's GPU while engines sample on it.

Parameters and optimizer state leave once a step and come back once, over the GPU's link to its
host and, for a disk, through the drives that a node's GPUs share. After a checkpoint, which needs
them as well, the engines get their weights a second time."""

import json
from functools import lru_cache

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.memory import Counts, checkpoint_bytes, persistent_bytes
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push import drafts_with_mtp, planned_engine_layout, planned_rank_bytes
from megatron_r1.plan.quantity import Quantity, Section, byte_quantity
from megatron_r1.push.plan import EngineLayout
from megatron_r1.push.plan.planner import PredictedLayout

OFFLOADED = "offloaded while engines sample"
"""The kind of host memory."""
OFFLOAD = "offload"
"""The part of a step."""
KINDS = ("parameters", "optimizer")


def offloads_state(job: PlannedJob) -> bool:
    """Return whether the job's parameters and optimizer state leave the GPU."""
    return job.verb == "rl" and job.config.parallel.offload_between_phases != "none"


def offloaded_bytes(job: PlannedJob, counts: Counts) -> int:
    """Return the bytes of a rank of one network that leave its GPU: 0 without the setting. Copies
    that the layers keep in FP8, and a reference on the device, stay."""
    if not offloads_state(job):
        return 0
    parts = persistent_bytes(
        job.config, counts, job.data_parallel_sizes, job.config.optimizer.moments
    )
    # What is no parameter, such as the routers' bias, stays.
    return sum(parts[kind] for kind in KINDS) - 4 * counts.buffers


def offloaded_host_bytes(job: PlannedJob, counts: Counts) -> dict[str, int]:
    """Return what of it a rank's host holds."""
    on_host = job.config.parallel.offload_between_phases == "host"
    return {OFFLOADED: offloaded_bytes(job, counts)} if offloads_state(job) and on_host else {}


def _most_offloaded_bytes(job: PlannedJob) -> int:
    """Return `offloaded_bytes` of policy and critic on the pipeline rank that has most."""
    networks = [job, job.critic] if job.critic else [job]
    counts = [RankCounts(network) for network in networks]
    return max(
        sum(offloaded_bytes(n, c.rank_counts(rank)) for n, c in zip(networks, counts, strict=True))
        for rank in range(job.parallel.pipeline)
    )


def offload_disk(job: PlannedJob) -> Section:
    """Return the room that a node's local disk needs; {} where nothing waits there."""
    if not offloads_state(job) or job.config.parallel.offload_between_phases != "disk":
        return {}
    ranks = min(job.hardware.gpus_per_node, job.world_size)
    num_bytes = _most_offloaded_bytes(job)
    formula = f"parallel.offload_folder: {ranks} ranks x {byte_quantity(num_bytes)}"
    return {OFFLOADED: byte_quantity(ranks * num_bytes, formula)}


def offload_time(job: PlannedJob, push_seconds: float) -> Section:
    """Return the seconds of a step; {} without the setting.

    Args:
        job: the job.
        push_seconds: those of a push, which a checkpoint repeats."""
    if not offloads_state(job):
        return {}
    num_bytes, hardware = _most_offloaded_bytes(job), job.hardware
    rate, link = hardware.host_link * job.assumptions.link_efficiency, "host_link"
    if job.config.parallel.offload_between_phases == "disk":
        own = hardware.local_disk / min(hardware.gpus_per_node, job.world_size)
        rate, link = min(rate, own), "a GPU's share of local_disk"
    every = job.config.checkpoint.every
    once = 2 * num_bytes / rate
    seconds = once + (once + push_seconds) / every
    formula = (
        f"{byte_quantity(num_bytes)} away and back / {link}, and once more with a push each "
        f"checkpoint.every={every} steps"
    )
    return {OFFLOAD: Quantity(seconds, "s", formula)}


def weight_load_time(job: PlannedJob) -> Quantity:
    """Return the seconds in which an engine GPU takes pushed weights out of its receive buffer."""
    assumptions, weights = job.assumptions, planned_rank_bytes(job)
    layout = planned_engine_layout(job)
    tensors = _num_tensors(json.dumps(job.hf), layout, drafts_with_mtp(job))
    rate = job.hardware.memory_bandwidth * assumptions.bandwidth_efficiency / 2  # read and written
    how = "read and written in the GPU's memory"
    if TRANSPORTS[job.config.push.transport].memory == "host":
        rate, how = job.hardware.host_link * assumptions.link_efficiency, "through the host's link"
    return Quantity(
        weights / rate + tensors * assumptions.tensor_load_seconds,
        "s",
        f"{byte_quantity(weights)} {how}, and {tensors:,} tensors x "
        f"{assumptions.tensor_load_seconds:g} s",
    )


@lru_cache
def _num_tensors(hf: str, layout: EngineLayout, drafting: bool) -> int:
    """Return the tensors of an engine's first GPU."""
    needs = PredictedLayout(json.loads(hf), layout, drafts=drafting)
    return sum(1 for _ in needs.needed(layout.coordinate(0)))


def sleep_wake_time(job: PlannedJob) -> Quantity:
    """Return the seconds of one sleep and one wake of all engines, which do so together."""
    assumptions = job.assumptions
    seconds = assumptions.sleep_seconds + assumptions.wake_seconds
    return Quantity(
        seconds,
        "s",
        f"{assumptions.sleep_seconds:g} s sleep_seconds + {assumptions.wake_seconds:g} s wake",
    )


def checkpoint_time(job: PlannedJob) -> Quantity:
    """Return a step's share of the seconds in which a checkpoint stops the trainer: its copy to
    the host, and the writing that steps until the next do not hide (`asynchronous`), or all."""
    settings, assumptions = job.config.checkpoint, job.assumptions
    counts = RankCounts(job)
    reference = job.computes_ref_logprobs or job.keeps_reference
    copied = max(
        checkpoint_bytes(
            job.config, counts.rank_counts(rank), job.data_parallel_sizes, with_reference=reference
        )
        for rank in range(job.parallel.pipeline)
    )
    seconds = copied / (job.hardware.host_link * assumptions.link_efficiency)
    formula = f"{byte_quantity(copied)} of a rank to its host"
    if not settings.asynchronous:
        seconds += copied / assumptions.storage
        formula += " and to storage"
    return Quantity(
        seconds / settings.every, "s", f"({formula}) / checkpoint.every={settings.every}"
    )
