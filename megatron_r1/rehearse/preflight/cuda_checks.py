"""Checks of what a run on GPUs loads and compiles."""

from collections.abc import Iterable, Sequence

from megatron_r1.plan.hardware import GIB
from megatron_r1.rehearse.preflight.check_result import (
    CheckResult,
    differing_ranks,
    join_values,
    rank_nodes,
)
from megatron_r1.rehearse.preflight.facts import NodeFacts, RankFacts


def library_results(facts: Sequence[RankFacts]) -> Iterable[CheckResult]:
    """Return the version of each CUDA library that ranks have loaded, and of each other version the
    first rank that has loaded it. Files may differ."""
    if facts[0].device == "cpu":
        yield CheckResult("CUDA libraries, attention, compilers", "no GPU")
    for name in dict.fromkeys(library.name for rank in facts for library in rank.libraries):
        loaded = {rank.rank: [lib for lib in rank.libraries if lib.name == name] for rank in facts}
        values = [
            (rank, " and ".join(lib.version for lib in loaded[rank.rank]) or "not loaded")
            for rank in facts
        ]
        majority, others = differing_ranks(values)
        first = dict(reversed([(value, rank) for rank, value in values]))
        files = {v: ", ".join(lib.file for lib in loaded[rank.rank]) for v, rank in first.items()}
        differing = [
            f"{value} on {first[value].host} (rank {first[value].rank}: {files[value]})"
            for value in dict.fromkeys(value for _, value in others)
        ]
        yield CheckResult(
            check=name,
            measured=f"{majority}: {files[majority]}",
            expected="equal on all ranks",
            problem=f"{join_values(differing)}; {majority} on the others" if others else "",
            hosts=rank_nodes(rank for rank, _ in others),
        )


def trainer_results(nodes: Sequence[tuple[RankFacts, NodeFacts]]) -> Iterable[CheckResult]:
    """Return the attention that Transformer Engine takes for the recipe, asked on every node, with
    what else a trainer refuses; and the communicators of a rank."""
    answers = [(facts, node.trainer) for facts, node in nodes if node.trainer is not None]
    faulty = [(facts, trainer.fault) for facts, trainer in answers if trainer.fault]
    hosts = rank_nodes(facts for facts, _ in faulty)
    choices = [(facts, trainer.attention) for facts, trainer in answers if trainer.attention]
    problem = f"on {join_values(hosts)}: {faulty[0][1]}" if faulty else ""
    if choices and not faulty:
        majority, others = differing_ranks(choices)
        hosts = rank_nodes(facts for facts, _ in others)
        problem = (
            f"{others[0][1]} on {join_values(hosts)}; {majority} on the others" if others else ""
        )
    if answers:
        yield CheckResult(
            check="attention",
            measured=", ".join(dict.fromkeys(choice for _, choice in choices)) or "none",
            expected="that a trainer starts with",
            problem=problem,
            hosts=hosts,
        )
    if choices:
        planned = next(trainer for _, trainer in answers if trainer.attention)
        measured = f"{planned.communicator_bytes / GIB:.1f} GiB: {planned.communicators}"
        yield CheckResult("communicators", measured, "planned, not measured")


def compiler_results(nodes: Sequence[tuple[RankFacts, NodeFacts]]) -> Iterable[CheckResult]:
    """Return whether each compiler that the run needs compiles on all nodes, and its time."""
    for name in dict.fromkeys(name for _, node in nodes for name in node.compilations):
        tried = [
            (facts, node.compilations[name]) for facts, node in nodes if name in node.compilations
        ]
        failed = [(facts, compilation) for facts, compilation in tried if compilation.error]
        hosts = rank_nodes(facts for facts, _ in failed)
        seconds = max(compilation.seconds for _, compilation in tried)
        yield CheckResult(
            check=f"compiler: {name}",
            measured=f"one kernel in at most {seconds:.1f} s",
            expected="compiles on all nodes",
            problem=f"not on {join_values(hosts)}: {failed[0][1].error}" if failed else "",
            hosts=hosts,
        )
