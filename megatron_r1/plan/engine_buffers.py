"""What vLLM 0.32 holds on each GPU of an engine besides weights and cache.

DeepEP's buffers for the exchange of tokens, and the state of the balancer of experts
(`rollout.redundant_experts`), with the experts that it moves."""

from typing import Any

from megatron_r1.plan.assumptions import link_rate
from megatron_r1.plan.engine_communication import HIGH_THROUGHPUT, LOW_LATENCY
from megatron_r1.plan.hardware import GIB
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import drafts_with_mtp, planned_engine_layout, pushed_byte_count
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import expert_tensors
from megatron_r1.reporting.formatting import format_count

DEEPEP_BUFFERS = "DeepEP's buffers"
BALANCER = "balancer of experts"
EXPERT_MOVES = "expert moves"
"""The part of a step in which pushed experts go from where a push puts them to their places."""

NODE_BUFFER_BYTES = NETWORK_BUFFER_BYTES = GIB
"""Bytes of VLLM_DEEPEP_BUFFER_SIZE_MB by default, of which DeepEP gets one buffer for NVLink and,
in high throughput over several nodes, one for the network (device_communicators/all2all.py)."""
WORKSPACE_BYTES = 32 << 20
"""DeepEP's NUM_WORKSPACE_BYTES."""
LOW_LATENCY_TOKENS = 256
"""Tokens of a rank's pass that low latency has room for, unless `rollout.vllm` has
max_num_batched_tokens (SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP)."""

MAP_SLOTS = 1024
"""Places of an expert's copies in the balancer's map (eplb_state.py, MAX_EXPERT_REDUNDANCY + 1)."""
LOAD_WINDOW = 1000
"""Passes whose load it keeps, unless `eplb_config` has window_size."""
REBALANCING_PASSES = 3000
"""Passes between two rearrangements, unless `eplb_config` has step_interval."""
DIRECT_COMMUNICATORS = ("nixl", "pynccl", "torch_nccl")
"""`eplb_config.communicator` by which experts move from GPU to GPU; gloo takes the hosts."""


def spreads_experts(job: PlannedJob) -> bool:
    """Return whether an engine's GPUs exchange the tokens of routed experts."""
    layout = planned_engine_layout(job)
    return layout.expert_parallel and layout.data_parallel > 1 and job.has_experts


def exchange_backend(job: PlannedJob) -> str | None:
    """Return the engines' `all2all_backend`, if the recipe gives one."""
    return job.config.rollout.vllm.get("all2all_backend")


def low_latency_tokens(job: PlannedJob) -> int:
    """Return the tokens of a rank's pass that DeepEP's low latency has room for."""
    return job.config.rollout.vllm.get("max_num_batched_tokens") or LOW_LATENCY_TOKENS


def low_latency_bytes(tokens: int, hidden: int, experts: int) -> int:
    """Return the bytes of a rank's buffers in NVSHMEM's memory, in bf16.

    Two that are sent and two that are received have room for a message of every token for every
    expert (DeepEP's csrc/config.hpp, `LowLatencyLayout`, without its counters).

    Args:
        tokens: most tokens of a rank's pass.
        hidden: values of a token.
        experts: routed experts and their copies."""
    scales = 4 * (hidden // 128)
    dispatched_bytes, combined_bytes = 16 + 2 * hidden, 2 * hidden + scales
    sent_bytes = max(tokens * dispatched_bytes, experts * tokens * combined_bytes)
    received_bytes = experts * tokens * max(dispatched_bytes, combined_bytes)
    return 2 * (sent_bytes + received_bytes)


def deepep_buffer_bytes(job: PlannedJob) -> int:
    """Return the bytes of DeepEP's buffers on an engine's GPU, which it keeps while it sleeps; 0
    with other backends."""
    backend = exchange_backend(job)
    if not job.generates or backend not in (LOW_LATENCY, HIGH_THROUGHPUT):
        return 0
    if not spreads_experts(job):
        return 0
    network_bytes = NETWORK_BUFFER_BYTES if job.engine_gpus > job.hardware.gpus_per_node else 0
    if backend == LOW_LATENCY:
        network_bytes = low_latency_bytes(
            low_latency_tokens(job), job.hf_config["hidden_size"], _num_slots(job)
        )
    return NODE_BUFFER_BYTES + network_bytes + WORKSPACE_BYTES


def deepep_formula(job: PlannedJob) -> str:
    """Return in words how DeepEP's buffers are counted."""
    common = f"{byte_quantity(NODE_BUFFER_BYTES)} for NVLink + "
    if exchange_backend(job) == LOW_LATENCY:
        return (
            f"{common}for the network 2 sent + 2 received x {_num_slots(job)} experts x "
            f"{low_latency_tokens(job):,} tokens (max_num_batched_tokens of rollout.vllm) x "
            "a token in bf16; kept while the engine sleeps"
        )
    return f"{common}as much for the network between nodes; kept while the engine sleeps"


def balancer_bytes(job: PlannedJob) -> int:
    """Return the bytes of the balancer's state on an engine's GPU, for the model and its drafter.

    Experts of a layer on their way, maps in int64, and loads in int32 (vLLM's
    distributed/eplb/eplb_state.py, `EplbState.add_model`); 0 without `rollout.redundant_experts`.
    """
    if not _has_balancer(job):
        return 0
    window = _balancer_setting(job, "window_size", LOAD_WINDOW)
    experts, slots = job.weight_table.num_experts, _num_slots(job)
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


def _num_slots(job: PlannedJob) -> int:
    """Return the routed experts of a layer of all an engine's GPUs, copies among them."""
    return job.weight_table.num_experts + planned_engine_layout(job).redundant_experts


def _slots_per_gpu(job: PlannedJob) -> int:
    return _num_slots(job) // job.engine_gpus


def _layers_of_networks(job: PlannedJob) -> tuple[int, int]:
    """Return the layers with routed experts of the model and of its drafter."""
    drafting_layers = len(job.weight_table.mtp) if drafts_with_mtp(job) else 0
    return sum(job.is_sparse_layer), drafting_layers
