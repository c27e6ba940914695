"""Computes the bytes of DeepEP's buffers, by which an engine's GPUs exchange tokens (vLLM 0.32).

Each GPU holds them besides weights and cache, also while the engine sleeps."""

from megatron_r1.plan.engine_communication import HIGH_THROUGHPUT, LOW_LATENCY
from megatron_r1.plan.expert_balancer import num_expert_slots
from megatron_r1.plan.hardware import GIB
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.push_costs import planned_engine_layout
from megatron_r1.plan.quantity import byte_quantity

DEEPEP_BUFFERS = "DeepEP's buffers"
NODE_BUFFER_BYTES = NETWORK_BUFFER_BYTES = GIB
"""Bytes of VLLM_DEEPEP_BUFFER_SIZE_MB by default, of which DeepEP gets one buffer for NVLink and,
in high throughput over several nodes, one for the network (device_communicators/all2all.py)."""
WORKSPACE_BYTES = 32 << 20
"""DeepEP's NUM_WORKSPACE_BYTES."""
LOW_LATENCY_TOKENS = 256
"""Tokens of a rank's pass that low latency has room for, unless `rollout.vllm` has
max_num_batched_tokens (SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP)."""


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
            low_latency_tokens(job), job.hf_config["hidden_size"], num_expert_slots(job)
        )
    return NODE_BUFFER_BYTES + network_bytes + WORKSPACE_BYTES


def deepep_formula(job: PlannedJob) -> str:
    """Return in words how DeepEP's buffers are counted."""
    common = f"{byte_quantity(NODE_BUFFER_BYTES)} for NVLink + "
    if exchange_backend(job) == LOW_LATENCY:
        return (
            f"{common}for the network 2 sent + 2 received x {num_expert_slots(job)} experts x "
            f"{low_latency_tokens(job):,} tokens (max_num_batched_tokens of rollout.vllm) x "
            "a token in bf16; kept while the engine sleeps"
        )
    return f"{common}as much for the network between nodes; kept while the engine sleeps"
