"""Counts a trainer rank's communicators of NCCL, and estimates what they take of its GPU.

torch makes one when a group's first collective runs (`platform.join_process_group`)."""

import math

from megatron_r1.base.transports import PUSH_CHANNELS, TRANSPORTS
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import has_push
from megatron_r1.plan.quantity import byte_quantity

COMMUNICATORS = "communicators"
GROUPS = {
    "default_pg": ("world",),
    "TENSOR_MODEL_PARALLEL_GROUP": ("tensor",),
    "CONTEXT_PARALLEL_GROUP": ("context",),
    "PIPELINE_MODEL_PARALLEL_GROUP": ("pipeline",),
    "DATA_PARALLEL_GROUP_WITH_CP": ("data", "context"),
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": ("world",),
}
"""torch's and Megatron's groups that a rank communicates in → the axes whose sizes multiply to
theirs. Megatron tells which groups it makes, but not which are used: these are counted, and
compared with this table by tests/parallel/test_communicators.py."""
EXPERT_GROUPS = {
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": ("tensor", "data", "context"),
    "EXPERT_MODEL_PARALLEL_GROUP": ("expert",),
    "EXPERT_TENSOR_PARALLEL_GROUP": ("expert_tensor",),
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": ("expert_tensor", "expert"),
    "EXPERT_DATA_PARALLEL_GROUP": ("expert_data",),
}
"""Likewise with routed experts."""
EMBEDDING_GROUP = "EMBEDDING_GROUP"
"""First and last pipeline rank, where both have the embedding."""
PUSH_NETWORK_BYTES = 2 * PUSH_CHANNELS["maxCTAs"] * 16 * (128 << 10)
"""What a push's communicator allocates for the network: in each direction 16 chunks a channel,
shared by all peers (NCCL 2.29, transport/net.cc: NCCL_SHARED_STEPS, NCCL_P2P_NET_CHUNKSIZE)."""


def group_sizes(job: PlannedJob) -> dict[str, int]:
    """Return the ranks of each communicator of a trainer rank, of those with several."""
    parallel, data = job.parallel, job.data_parallel_size
    axes = {"world": job.world_size, "data": data, "expert_data": job.expert_data_parallel_size}
    groups = GROUPS | EXPERT_GROUPS if job.has_experts else GROUPS
    sizes = {
        name: math.prod(axes.get(axis) or getattr(parallel, axis) for axis in of)
        for name, of in groups.items()
    }
    if job.with_mtp or job.hf_config.get("tie_word_embeddings"):
        sizes[EMBEDDING_GROUP] = min(parallel.pipeline, 2)
    if parallel.pipeline > 1:  # a communicator of the two for each neighbour, or each direction
        sizes |= {"stage before": 2, "stage behind": 2}
    return {name: size for name, size in sizes.items() if size > 1}


def communicator_bytes(job: PlannedJob) -> int:
    """Return the bytes of a trainer rank's communicators, the push's among them."""
    in_push = _is_in_push(job) * PUSH_NETWORK_BYTES
    return round(len(group_sizes(job)) * job.assumptions.communicator) + in_push


def communicator_formula(job: PlannedJob) -> str:
    """Return in words how they are counted."""
    count = len(group_sizes(job))
    text = f"{count} of Megatron's groups x {byte_quantity(job.assumptions.communicator)}, a guess"
    if _is_in_push(job):
        text += f"; the push's {byte_quantity(PUSH_NETWORK_BYTES)}"
    return text


def _is_in_push(job: PlannedJob) -> bool:
    return has_push(job) and TRANSPORTS[job.config.push.transport].sends_in_rounds
