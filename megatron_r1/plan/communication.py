"""Communication: the bytes that a trainer rank sends, by parallel axis, with their time on the
axis's slowest link; and seconds of the exchanges between an engine's GPUs in one layer, which are
sums over tensor ranks, and the tokens of routed experts by vLLM's backend (`all2all_backend`).

Bytes sent by one trainer rank: an all-gather or reduce-scatter of X bytes over n ranks sends
X (n - 1) / n, an all-to-all the share for other ranks. Ranks are laid out as in Megatron: tensor,
context, data, pipeline from the inside out; expert groups span the first three.

NCCL's latencies and shares of the rate are its own model's (NVIDIA/nccl, src/graph/tuning.cc: it
chooses algorithm and protocol by them); those of DeepEP are measured (deepseek-ai/DeepEP,
docs/legacy.md: H800, an adapter of 400 Gb/s a GPU, 7,168 values a token, 8 experts)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1.config.hardware import Assumptions, Hardware, link_rate
from megatron_r1.models.hf_config import head_sizes, key_value_heads
from megatron_r1.models.memory import BYTES, ParameterCounts
from megatron_r1.plan.counts import RankCounts
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import QuantityTable, byte_quantity
from megatron_r1.reporting.formatting import format_count

ACTIVATION_BYTES = BYTES["bfloat16"]
"""Bytes of an activation that is sent."""


@dataclass(frozen=True)
class AxisTraffic:
    """Traffic of one parallel axis on one rank of the busiest pipeline stage.

    Attributes:
        size: the number of ranks of a group.
        span: the ranks from the first to the last of a group, which decides whether it fits a
            node.
        formula: how the bytes were computed, as the report shows it.
        microbatch_bytes: bytes sent for one micro-batch, forward and backward.
        forward_bytes: bytes of `microbatch_bytes` that are sent in the forward pass.
        step_bytes: bytes sent once per optimizer step.
    """

    size: int
    span: int
    formula: str
    microbatch_bytes: float = 0
    forward_bytes: float = 0
    step_bytes: float = 0

    def seconds(self, job: PlannedJob, num_bytes: float) -> float:
        """Return the seconds in which `num_bytes` cross the links of a group of this axis."""
        return num_bytes / link_rate(job.hardware, job.assumptions, self.span)


def traffic_by_axis(job: PlannedJob, rank: int) -> dict[str, AxisTraffic]:
    """Return every axis with more than one rank, on pipeline rank `rank`."""
    dense, sparse = job.layers(rank)
    axes = {
        "tensor": _tensor(job, dense + sparse),
        "context": _context(job, dense + sparse),
        "expert": _expert(job, sparse),
        "pipeline": _pipeline(job),
        "data": _data(job, RankCounts(job).rank_counts(rank)),
    }
    return {name: group for name, group in axes.items() if group and group.size > 1}


def _tensor(job: PlannedJob, layers: int) -> AxisTraffic:
    hf, size, tokens = job.hf, job.parallel.tensor, job.rank_tokens
    hidden_size, fraction = hf["hidden_size"], (size - 1) / size
    gathered_values = scattered_values = 2 * hidden_size
    if job.latent_attention:
        gathered_values = hidden_size + (hf.get("q_lora_rank") or hidden_size) + hf["kv_lora_rank"]
    forward_bytes = (
        layers * (gathered_values + scattered_values) * tokens * ACTIVATION_BYTES * fraction
    )
    backward_bytes = (
        layers * (2 * gathered_values + scattered_values) * tokens * ACTIVATION_BYTES * fraction
    )
    recomputed_bytes = forward_bytes if job.parallel.recompute == "full" else 0
    formula = (
        f"{format_count(layers, 'layer')} x (gather {gathered_values} + scatter {scattered_values} "
        f"values) x {tokens:,.0f} tokens x {ACTIVATION_BYTES} B x {fraction:.2f}, backward with "
        "the gathers once more"
    )
    return AxisTraffic(
        size, size, formula, forward_bytes + backward_bytes + recomputed_bytes, forward_bytes
    )


def _context(job: PlannedJob, layers: int) -> AxisTraffic:
    hf, size, tokens = job.hf, job.parallel.context, job.rank_tokens
    # With fewer key and value heads than tensor ranks, several ranks send the same one.
    heads = max(key_value_heads(hf), job.parallel.tensor)
    values = heads * sum(head_sizes(hf)) / job.parallel.tensor
    forward_bytes = layers * values * tokens * (size - 1) * ACTIVATION_BYTES
    recomputes = job.parallel.recompute == "full"
    formula = (
        f"{format_count(layers, 'layer')} x {values:,.0f} key and value features x {tokens:,.0f} "
        f"tokens x {format_count(size - 1, 'other rank')} x {ACTIVATION_BYTES} B; backward: again, "
        "and their gradients"
    )
    return AxisTraffic(
        size, size * job.parallel.tensor, formula, (3 + recomputes) * forward_bytes, forward_bytes
    )


def _expert(job: PlannedJob, sparse_layers: int) -> AxisTraffic | None:
    if not sparse_layers:
        return None
    parallel, size = job.parallel, job.parallel.expert
    tokens = job.tokens_per_tensor_rank(job.rank_tokens)
    topk = job.hf["num_experts_per_tok"]
    span, max_nodes = size * parallel.expert_tensor, job.hf.get("topk_group") or math.inf
    copies, receivers = topk, "experts"
    if parallel.dispatcher == "flex":
        num_nodes = -(-span // job.hardware.gpus_per_node)
        copies = copies_of_token(size, num_nodes, topk, max_nodes)
        receivers = "nodes (DeepEP)" if num_nodes > 1 else "ranks (DeepEP)"
    sent_tokens = copies * tokens * job.assumptions.expert_imbalance
    one_way_bytes = (
        sparse_layers * sent_tokens * job.hf["hidden_size"] * ACTIVATION_BYTES * (size - 1) / size
    )
    recomputes_experts = parallel.recompute == "selective" and "moe" in parallel.recompute_modules
    num_times = 6 if parallel.recompute == "full" or recomputes_experts else 4
    formula = (
        f"{format_count(sparse_layers, 'layer')} x {copies:.3g} {receivers} x {tokens:,.0f} "
        f"tokens x {job.hf['hidden_size']} x {ACTIVATION_BYTES} B x {(size - 1) / size:.2f} x "
        f"imbalance {job.assumptions.expert_imbalance}, out and back, {num_times} times"
    )
    return AxisTraffic(size, span, formula, num_times * one_way_bytes, 2 * one_way_bytes)


def _pipeline(job: PlannedJob) -> AxisTraffic:
    tokens = job.tokens_per_tensor_rank(job.rank_tokens)
    state_bytes = tokens * job.hf["hidden_size"] * ACTIVATION_BYTES * job.num_model_chunks
    formula = (
        f"{tokens:,.0f} tokens x {job.hf['hidden_size']} x {ACTIVATION_BYTES} B x "
        f"{format_count(job.num_model_chunks, 'chunk')}, states forward and gradients backward"
    )
    return AxisTraffic(job.parallel.pipeline, job.world_size, formula, 2 * state_bytes, state_bytes)


def _data(job: PlannedJob, counts: ParameterCounts) -> AxisTraffic:
    parameter_bytes = job.parameter_bytes
    dense, expert = job.data_context_parallel_size, job.expert_data_parallel_size
    sent_values = counts.dense * (dense - 1) / dense + counts.expert * (expert - 1) / expert
    formula = (
        f"gradients reduce-scattered in fp32, parameters gathered in {parameter_bytes} B: "
        f"{counts.dense:,} dense over {dense}, {counts.expert:,} expert over {expert} ranks"
    )
    span = job.world_size // job.parallel.pipeline
    return AxisTraffic(dense, span, formula, step_bytes=sent_values * (4 + parameter_bytes))


def communication_section(job: PlannedJob, rank: int) -> QuantityTable:
    """Return the bytes that one rank of pipeline rank `rank` sends per optimizer step, by group."""
    return {
        f"{name} ({group.size} ranks)": byte_quantity(
            group.microbatch_bytes * job.num_microbatches + group.step_bytes,
            (
                f"{format_count(job.num_microbatches, 'micro-batch')} x "
                if group.microbatch_bytes
                else ""
            )
            + group.formula,
        )
        for name, group in traffic_by_axis(job, rank).items()
    }


NCCL, LOW_LATENCY, HIGH_THROUGHPUT = BACKENDS = (
    "allgather_reducescatter",
    "deepep_low_latency",
    "deepep_high_throughput",
)
"""Backends that are priced; the first is vLLM's default, and stands for all others."""


@dataclass(frozen=True)
class NCCLProtocol:
    """A protocol of NCCL in one algorithm.

    Attributes:
        start_seconds: seconds of any collective.
        nvlink_hop_seconds: seconds of a step between GPUs of a node.
        network_hop_seconds: seconds of a step between nodes.
        fraction: the part of the rate that it reaches."""

    start_seconds: float
    nvlink_hop_seconds: float
    network_hop_seconds: float
    fraction: float


RING = (NCCLProtocol(6.6e-6, 1e-6, 2.7e-6, 1 / 4), NCCLProtocol(14e-6, 1.9e-6, 4e-6, 0.92))
"""LL and LL128. A step within a node takes at least 1 us, the time to notify the network."""
TREE = (NCCLProtocol(6.8e-6, 0.6e-6, 5e-6, 1 / 3.8), NCCLProtocol(14e-6, 1.25e-6, 8.5e-6, 0.92))

LOW_LATENCY_SECONDS = {
    8: (77e-6, 114e-6),
    16: (118e-6, 195e-6),
    32: (155e-6, 273e-6),
    64: (173e-6, 314e-6),
    128: (192e-6, 369e-6),
    256: (194e-6, 360e-6),
}
"""DeepEP's low-latency kernels, by ranks: (dispatch in FP8, combine in bf16) of 128 tokens a rank
to 8 experts each."""
LOW_LATENCY_VALUES = 128 * 8 * 7168
"""Values that a rank sends in a row of that table."""
HIGH_THROUGHPUT_RATES = {8: 153e9, 16: 43e9, 32: 58e9, 64: 51e9}
"""Bytes per second of DeepEP's normal kernels, by ranks: over NVLink up to 8, over the network
beyond. Those of combining are within 2%."""
MEASURED_NETWORK, MEASURED_NVLINK = 50e9, 200e9
"""The rates of the machines of both tables, in this planner's terms (`Hardware`)."""


@dataclass(frozen=True)
class EngineInterconnect:
    """The links between GPUs of one engine.

    Attributes:
        hardware: a GPU and its links.
        assumptions: with the share of the links' rates, and the host's waiting."""

    hardware: Hardware
    assumptions: Assumptions

    def nodes(self, ranks: int) -> int:
        """Return the nodes that hold so many ranks."""
        return -(-ranks // self.hardware.gpus_per_node)

    def _rate(self, ranks: int) -> float:
        """Return bytes per second around a ring: over nodes, through all adapters of a node."""
        hardware = self.hardware
        is_one_node = self.nodes(ranks) == 1
        rate = hardware.nvlink if is_one_node else hardware.network * hardware.gpus_per_node
        return min(rate, hardware.nvlink) * self.assumptions.link_efficiency

    def all_reduce_seconds(self, ranks: int, num_bytes: float) -> float:
        """Return seconds of a sum of `num_bytes` over `ranks` GPUs, along NCCL's tree."""
        if ranks == 1:
            return 0.0
        nodes = self.nodes(ranks)
        nvlink_hops, rate = min(ranks, self.hardware.gpus_per_node) - 1, self._rate(ranks)
        return min(
            protocol.start_seconds
            + 2
            * (
                nvlink_hops * protocol.nvlink_hop_seconds
                + math.log2(nodes) * protocol.network_hop_seconds
            )
            + 2 * num_bytes / (rate * protocol.fraction)
            for protocol in TREE
        )

    def all_gather_seconds(self, ranks: int, num_bytes: float) -> float:
        """Return seconds in which each of `ranks` GPUs gets all `num_bytes`, around NCCL's ring; a
        reduce-scatter of as many takes the same."""
        if ranks == 1:
            return 0.0
        network_hops, rate = self.nodes(ranks) - 1, self._rate(ranks)
        nvlink_hops = ranks - 1 - network_hops
        return min(
            protocol.start_seconds
            + nvlink_hops * protocol.nvlink_hop_seconds
            + network_hops * protocol.network_hop_seconds
            + num_bytes * (ranks - 1) / ranks / (rate * protocol.fraction)
            for protocol in RING
        )


@dataclass(frozen=True)
class ExpertExchange:
    """The exchange of tokens of a layer's routed experts, there and back.

    Attributes:
        links: the links between the ranks.
        ranks: GPUs that the experts are spread over.
        hidden: values of a token.
        topk: experts of a token.
        max_nodes: the most nodes that a token is sent to (the router's groups).
        value: bytes of a value on its way to the experts; 2 on its way back."""

    links: EngineInterconnect
    ranks: int
    hidden: int
    topk: int
    max_nodes: float
    value: int = 2

    def seconds(self, backend: str, tokens: float) -> float:
        """Return the seconds with `tokens` on each rank."""
        if self.ranks == 1:
            return 0.0
        if backend == LOW_LATENCY:
            return self._low_latency(tokens)
        if backend == HIGH_THROUGHPUT:
            return self._high_throughput(tokens)
        gathered_values = tokens * self.ranks * self.hidden
        dispatch_seconds = self.links.all_gather_seconds(self.ranks, gathered_values * self.value)
        return dispatch_seconds + self.links.all_gather_seconds(self.ranks, gathered_values * 2)

    def _low_latency(self, tokens: float) -> float:
        """Return DeepEP's measured times, the part beyond a start in proportion to the bytes."""
        dispatch, combine = _between(LOW_LATENCY_SECONDS, self.ranks)
        start = RING[0].start_seconds + RING[0].network_hop_seconds
        load = tokens * self.topk * self.hidden / LOW_LATENCY_VALUES
        slowdown = MEASURED_NETWORK / self.links.hardware.network
        transfer_seconds = (dispatch - start) * self.value + (combine - start)
        return 2 * start + load * slowdown * transfer_seconds

    def _high_throughput(self, tokens: float) -> float:
        """Return the bytes of a token, once to each node (within one, to each GPU), at DeepEP's
        measured rate, and the host's wait for the number of tokens."""
        hardware, nodes = self.links.hardware, self.links.nodes(self.ranks)
        (rate,) = _between({n: (rate,) for n, rate in HIGH_THROUGHPUT_RATES.items()}, self.ranks)
        rate *= (
            hardware.nvlink / MEASURED_NVLINK if nodes == 1 else hardware.network / MEASURED_NETWORK
        )
        copies = copies_of_token(self.ranks, nodes, self.topk, self.max_nodes)
        sent_bytes = tokens * copies * self.hidden * (self.value + 2)
        return sent_bytes / rate + self.links.assumptions.host_stall_seconds


def copies_of_token(ranks: int, nodes: int, topk: int, max_nodes: float) -> float:
    """Return how often DeepEP sends a token: once to each node, or within one to each rank.

    Args:
        ranks: the expert-parallel ranks.
        nodes: the nodes that have them.
        topk: experts that a token is routed to.
        max_nodes: the most nodes that a token is sent to (the router's groups)."""
    if nodes == 1:
        return expected_distinct(ranks, topk)
    return min(max_nodes, expected_distinct(nodes, topk))


def expected_distinct(size: int, draws: int) -> float:
    """Return the mean number of distinct values among even draws: n (1 - (1 - 1/n)^k).

    Args:
        size: the number of values, n.
        draws: how many are drawn with replacement, k."""
    return size * (1 - (1 - 1 / size) ** draws)


def _between(table: Mapping[int, tuple[float, ...]], ranks: int) -> tuple[float, ...]:
    """Return the row of `ranks`, along doublings between rows; the nearest beyond the ends."""
    sizes = sorted(table)
    if ranks <= sizes[0] or ranks >= sizes[-1]:
        return table[sizes[0] if ranks <= sizes[0] else sizes[-1]]
    larger_size = next(size for size in sizes if size >= ranks)
    smaller_size = sizes[sizes.index(larger_size) - 1]
    fraction = math.log2(ranks / smaller_size) / math.log2(larger_size / smaller_size)
    return tuple(
        a + fraction * (b - a) for a, b in zip(table[smaller_size], table[larger_size], strict=True)
    )
