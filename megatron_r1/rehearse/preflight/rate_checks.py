"""Checks of measured rates: matrix products, links of the parallel axes, links between nodes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median, median_high
from typing import Literal

from megatron_r1.plan.assumptions import Assumptions, link_rate
from megatron_r1.plan.hardware import HARDWARE, Hardware
from megatron_r1.rehearse.preflight.check_result import (
    MAX_LISTED,
    CheckResult,
    join_values,
    rank_nodes,
)
from megatron_r1.rehearse.preflight.facts import RankFacts
from megatron_r1.rehearse.preflight.links import AXIS_COLLECTIVES
from megatron_r1.rehearse.settings import PreflightConfig


def product_result(facts: Sequence[RankFacts], settings: PreflightConfig) -> CheckResult:
    """Return which ranks compute matrix products slowly."""
    median_rate = median_high(rank_facts.product_flops for rank_facts in facts)
    slow = [
        rank_facts
        for rank_facts in facts
        if rank_facts.product_flops < settings.slowest * median_rate
    ]
    ranks = [f"rank {rank_facts.rank} on {rank_facts.host}" for rank_facts in slow]
    slowest = min(facts, key=lambda rank_facts: rank_facts.product_flops)
    return CheckResult(
        check="matrix products",
        measured=f"median {median_rate / 1e12:.3g} TFLOP/s, "
        f"slowest {slowest.product_flops / 1e12:.3g} (rank {slowest.rank} on {slowest.host})",
        expected=f"{settings.slowest:.0%} of the median",
        problem=f"slow: {join_values(ranks)}" if slow else "",
        hosts=rank_nodes(slow),
    )


def link_results(facts: Sequence[RankFacts], settings: PreflightConfig) -> Iterable[CheckResult]:
    """Return the rate of each parallel axis, with its slow groups."""
    hardware = hardware_of(settings, facts)
    is_gpu = facts[0].device == "cuda"
    for axis, (_, operation) in AXIS_COLLECTIVES.items():
        groups = group_rates(facts, axis)
        if not groups:
            continue
        median_rate = median_high(groups.values())
        assumed = link_rate(
            hardware, Assumptions(), max(max(ranks) - min(ranks) + 1 for ranks in groups)
        )
        slow_groups = [
            ranks for ranks, rate in groups.items() if rate < settings.slowest * median_rate
        ]
        sound_groups = [ranks for ranks in groups if ranks not in slow_groups]
        hosts = {facts[rank].host for ranks in slow_groups for rank in ranks}
        hosts = hosts - {facts[rank].host for ranks in sound_groups for rank in ranks} or hosts
        problems = [
            f"{groups[ranks] / 1e9:.3g} GB/s among ranks {join_values(ranks)}"
            for ranks in slow_groups[:MAX_LISTED]
        ]
        if is_gpu and median_rate < settings.bandwidth * assumed:
            problems.append(
                f"{median_rate / assumed:.0%} of the planner's rate: does NCCL use the fast "
                "network (NCCL_DEBUG=INFO)?"
            )
        yield CheckResult(
            check=f"{axis}: {operation}",
            measured=f"{median_rate / 1e9:.3g} GB/s in {len(groups)} groups of "
            f"{len(next(iter(groups)))}",
            expected=f"{assumed / 1e9:.3g} GB/s ({hardware.name})" if is_gpu else "none for CPUs",
            problem="; ".join(problems),
            hosts=tuple(sorted(hosts)),
        )


def pair_results(facts: Sequence[RankFacts], settings: PreflightConfig) -> Iterable[CheckResult]:
    """Return the rate between nodes, with the slow ones; nothing on one node."""
    rates = node_rates(facts, "pair_rates")
    if not rates:
        return
    median_rate = median_high(rates.values())
    hosts = _slow_nodes(facts, rates, settings.slowest * median_rate)
    yield CheckResult(
        check="links between nodes",
        measured=f"median {median_rate / 1e9:.3g} GB/s, slowest {min(rates.values()) / 1e9:.3g}",
        expected=f"{settings.slowest:.0%} of the median",
        problem=f"slow to every neighbor: {join_values(hosts)}" if hosts else "",
        hosts=hosts,
    )


def gloo_results(facts: Sequence[RankFacts], settings: PreflightConfig) -> Iterable[CheckResult]:
    """Return the rate of ranks over gloo, with the slow nodes; nothing where none was measured."""
    rates = node_rates(facts, "gloo_rates")
    if not rates:
        return
    hardware, median_rate = hardware_of(settings, facts), median_high(rates.values())
    hosts = _slow_nodes(facts, rates, settings.slowest * median_rate)
    fraction = median_rate / hardware.host_network
    problems = []
    if hosts:
        problems.append(f"slow to every neighbor: {join_values(hosts)}")
    if fraction < settings.bandwidth:
        problems.append(
            f"{fraction:.0%} of the planner's host_network, so that what goes over it takes "
            f"{1 / fraction:.2g} times as long as planned: does GLOO_SOCKET_IFNAME name the fast "
            "interface? Plan with --preflight.calibration's file"
        )
    yield CheckResult(
        check="host network",
        measured=f"a rank of the median node {median_rate / 1e9:.3g} GB/s, of the slowest "
        f"{min(rates.values()) / 1e9:.3g}",
        expected=f"{hardware.host_network / 1e9:.3g} GB/s (planner)",
        level="block" if hosts else "note",
        problem="; ".join(problems),
        hosts=hosts,
    )


def _slow_nodes(
    facts: Sequence[RankFacts], rates: dict[int, float], limit: float
) -> tuple[str, ...]:
    """Return the names of the nodes whose rate is below a limit, bytes per second."""
    return rank_nodes(
        rank_facts for rank_facts in facts if rates.get(rank_facts.node_index, limit) < limit
    )


def hardware_of(settings: PreflightConfig, facts: Sequence[RankFacts]) -> Hardware:
    """Return the planner's hardware: the one that is named, or whose name is in the GPU's, or
    H800, with the node's number of ranks as its GPUs."""
    gpu = facts[0].node.versions.get("GPU", "") if facts[0].node else ""
    name = settings.hardware or next((name for name in HARDWARE if name in gpu), "H800")
    ranks = sum(rank_facts.node_index == 0 for rank_facts in facts)
    return replace(HARDWARE[name], gpus_per_node=ranks)


def group_rates(facts: Sequence[RankFacts], axis: str) -> dict[tuple[int, ...], float]:
    """Return the rate of each group of a parallel axis, by its ranks."""
    rates: dict[tuple[int, ...], float] = {}
    for rank_facts in facts:
        if link := rank_facts.links.get(axis):
            ranks = tuple(link.ranks)
            rates[ranks] = min(rates.get(ranks, link.rate), link.rate)
    return rates


def node_rates(
    facts: Sequence[RankFacts], kind: Literal["pair_rates", "gloo_rates"]
) -> dict[int, float]:
    """Return the rate of each node to the better of its neighbors: the median of its ranks."""
    rates: dict[int, list[float]] = {}
    for rank_facts in facts:
        if neighbor_rates := getattr(rank_facts, kind):
            rates.setdefault(rank_facts.node_index, []).append(max(neighbor_rates))
    return {node: median(rank_rates) for node, rank_rates in rates.items()}
