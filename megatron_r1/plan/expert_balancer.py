"""Computes what vLLM 0.32's balancer of experts (`rollout.redundant_experts`) costs an engine.

That is the state which each GPU holds besides weights and cache, and the experts that move."""

from typing import Any

from megatron_r1.plan.assumptions import link_rate
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import drafts_with_mtp, planned_engine_layout, pushed_byte_count
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import expert_tensors
from megatron_r1.reporting.formatting import format_count

BALANCER = "balancer of experts"
EXPERT_MOVES = "expert moves"
"""The part of a step in which pushed experts go from where a push puts them to their places."""
MAP_SLOTS = 1024
"""Places of an expert's copies in the balancer's map (eplb_state.py, MAX_EXPERT_REDUNDANCY + 1)."""
LOAD_WINDOW = 1000
"""Passes whose load it keeps, unless `eplb_config` has window_size."""
REBALANCING_PASSES = 3000
"""Passes between two rearrangements, unless `eplb_config` has step_interval."""
DIRECT_COMMUNICATORS = ("nixl", "pynccl", "torch_nccl")
"""`eplb_config.communicator` by which experts move from GPU to GPU; gloo takes the hosts."""


def balancer_bytes(job: PlannedJob) -> int:
    """Return the bytes of the balancer's state on an engine's GPU, for the model and its drafter.

    Experts of a layer on their way, maps in int64, and loads in int32 (vLLM's
    distributed/eplb/eplb_state.py, `EplbState.add_model`); 0 without `rollout.redundant_experts`.
    """
    if not _has_balancer(job):
        return 0
    window = _balancer_setting(job, "window_size", LOAD_WINDOW)
    experts, slots = job.weight_table.num_experts, num_expert_slots(job)
    # From an expert to its places, to their number and to its last load; from a place to an expert.
    map_bytes = 8 * (experts * (MAP_SLOTS + 2) + slots)
    load_bytes = 4 * slots * (window + 1)
    networks = [layers for layers in _layers_of_networks(job) if layers]
    buffer_bytes = _slots_per_gpu(job) * expert_bytes(job)
    return sum(buffer_bytes + layers * (map_bytes + load_bytes) for layers in networks)


def expert_bytes(job: PlannedJob) -> int:
    """Return the bytes of one routed expert of a layer in an engine."""
    count, layer = pushed_byte_count(job), job.is_sparse_layer.index(True)
    return sum(
        count(tensor.name, tensor.rule.dtype, Region.full(tensor.shape))
        for tensor in expert_tensors(job.weight_table, [layer], [0])
    )


def moved_expert_bytes(job: PlannedJob) -> int:
    """Return the most bytes of experts that come to a GPU, as the balancer may choose any GPU for
    each of them."""
    return sum(_layers_of_networks(job)) * _slots_per_gpu(job) * expert_bytes(job)


def moved_experts_section(job: PlannedJob) -> QuantityTable:
    """Return the bytes of experts that vLLM's balancer moves; {} without one."""
    if not _has_balancer(job):
        return {}
    interval = _balancer_setting(job, "step_interval", REBALANCING_PASSES)
    after_push = (
        "; after a push, which resets their places, none"
        if job.config.rollout.colocated
        else ", and after every push from where it puts them"
    )
    formula = (
        f"into a GPU, at most: {format_count(sum(_layers_of_networks(job)), 'layer')} x "
        f"{format_count(_slots_per_gpu(job), 'expert')} x {byte_quantity(expert_bytes(job))}, each "
        f"{interval:,} passes, while others decode{after_push}"
    )
    return {"experts moved": byte_quantity(moved_expert_bytes(job), formula)}


def expert_move_time(job: PlannedJob) -> QuantityTable:
    """Return the seconds in which pushed experts move to where the balancer has them.

    That is in engines/plugin/expert_placement.py; {} without a balancer, and for colocated engines,
    which begin with the places of a push."""
    if not _has_balancer(job) or job.config.rollout.colocated:
        return {}
    num_bytes, hardware = moved_expert_bytes(job), job.hardware
    if _balancer_setting(job, "communicator", "torch_gloo") in DIRECT_COMMUNICATORS:
        seconds = num_bytes / link_rate(hardware, job.assumptions, job.engine_gpus)
        route = "the links between GPUs"
    else:
        copies = 2 * num_bytes / (hardware.host_link * job.assumptions.link_efficiency)
        seconds = num_bytes / hardware.host_network + copies
        route = "host_network, and host_link before and behind it (gloo)"
    formula = f"{byte_quantity(num_bytes)} at most into a GPU / {route}"
    return {EXPERT_MOVES: Quantity(seconds, "s", formula)}


def _has_balancer(job: PlannedJob) -> bool:
    return bool(job.generates and job.has_experts and planned_engine_layout(job).redundant_experts)


def _balancer_setting(job: PlannedJob, name: str, default: Any) -> Any:
    """Return a setting of `rollout.vllm.eplb_config`, or vLLM's default."""
    return job.config.rollout.vllm.get("eplb_config", {}).get(name) or default


def num_expert_slots(job: PlannedJob) -> int:
    """Return the routed experts of a layer of all an engine's GPUs, copies among them."""
    return job.weight_table.num_experts + planned_engine_layout(job).redundant_experts


def _slots_per_gpu(job: PlannedJob) -> int:
    return num_expert_slots(job) // job.engine_gpus


def _layers_of_networks(job: PlannedJob) -> tuple[int, int]:
    """Return the layers with routed experts of the model and of its drafter."""
    drafting_layers = len(job.weight_table.mtp) if drafts_with_mtp(job) else 0
    return sum(job.is_sparse_layer), drafting_layers
