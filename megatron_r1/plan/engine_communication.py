"""Seconds of the exchanges between an engine's GPUs in one layer: sums over tensor ranks, and the
tokens of routed experts by vLLM's backend (`all2all_backend`). How many copies of a token DeepEP
sends is also the trainer's.

NCCL's latencies and shares of the rate are its own model's (NVIDIA/nccl, src/graph/tuning.cc: it
chooses algorithm and protocol by them); those of DeepEP are measured (deepseek-ai/DeepEP,
docs/legacy.md: H800, an adapter of 400 Gb/s a GPU, 7,168 values a token, 8 experts)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.hardware import Hardware

NCCL = "allgather_reducescatter"
LOW_LATENCY = "deepep_low_latency"
HIGH_THROUGHPUT = "deepep_high_throughput"
BACKENDS = (NCCL, LOW_LATENCY, HIGH_THROUGHPUT)
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

    def _ring_rate(self, ranks: int) -> float:
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
        nvlink_hops, rate = min(ranks, self.hardware.gpus_per_node) - 1, self._ring_rate(ranks)
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
        network_hops, rate = self.nodes(ranks) - 1, self._ring_rate(ranks)
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
        dispatch, combine = _interpolate_row(LOW_LATENCY_SECONDS, self.ranks)
        start = RING[0].start_seconds + RING[0].network_hop_seconds
        load = tokens * self.topk * self.hidden / LOW_LATENCY_VALUES
        slowdown = MEASURED_NETWORK / self.links.hardware.network
        transfer_seconds = (dispatch - start) * self.value + (combine - start)
        return 2 * start + load * slowdown * transfer_seconds

    def _high_throughput(self, tokens: float) -> float:
        """Return DeepEP's seconds for a token's bytes, once to each node (within one, to each GPU),
        and of the host's wait for the number of tokens."""
        hardware, nodes = self.links.hardware, self.links.nodes(self.ranks)
        (rate,) = _interpolate_row(
            {n: (rate,) for n, rate in HIGH_THROUGHPUT_RATES.items()}, self.ranks
        )
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
        return mean_distinct_values(ranks, topk)
    return min(max_nodes, mean_distinct_values(nodes, topk))


def mean_distinct_values(size: int, draws: int) -> float:
    """Return the mean number of distinct values among even draws: n (1 - (1 - 1/n)^k).

    Args:
        size: the number of values, n.
        draws: how many are drawn with replacement, k."""
    return size * (1 - (1 - 1 / size) ** draws)


def _interpolate_row(table: Mapping[int, tuple[float, ...]], ranks: int) -> tuple[float, ...]:
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
