"""Which engine ranks of a colocated run are on the GPUs, and so in the nodes, of trainer ranks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

EngineRank = tuple[int, int, int]
"""(set, member, position): the engine is number `member` of the set."""

RANKS_PER_NODE = 8
"""Trainer ranks of a node where no plan says otherwise, a GPU each."""
SAME_NODE_LOAD = 0.3
"""Time of a byte within a node over that of one through an adapter: 44.26 GB/s through an adapter
(prime-rl#3341), 150 GB/s over NVLink (0.75 of an H800's)."""


@dataclass(frozen=True)
class SharedGPUs:
    """Which trainer rank is on the GPU of each engine rank, for the engine ranks that share a GPU,
    and the node of each trainer rank.

    NCCL refuses a pair of ranks on one GPU: their slices would go over gloo, at a thirtieth of the
    rate."""

    trainer_rank: Mapping[EngineRank, int]
    nodes: Sequence[Hashable]

    def in_its_node(self, senders: Sequence[int], receiver: EngineRank) -> list[int]:
        """Return those of the trainer ranks that are in the node of an engine rank; none for an
        engine rank with a GPU of its own."""
        neighbor = self.trainer_rank.get(receiver)
        if neighbor is None:
            return []
        return [rank for rank in self._ranks_of_node[self.nodes[neighbor]] if rank in senders]

    @cached_property
    def _ranks_of_node(self) -> dict[Hashable, list[int]]:
        ranks: dict[Hashable, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            ranks.setdefault(node, []).append(rank)
        return ranks

    def load(self, sender: int, receiver: EngineRank, num_bytes: float) -> float:
        """Return how long sending keeps the trainer rank busy, in bytes through its adapter."""
        return num_bytes * (SAME_NODE_LOAD if self.in_its_node([sender], receiver) else 1)


NONE_SHARED = SharedGPUs({}, ())


def shared_in_order(
    sets: Sequence[range], ranks_per_engine: int, world: int, ranks_per_node: int = RANKS_PER_NODE
) -> SharedGPUs:
    """Return the shared GPUs of engines whose ranks are on the trainer ranks' GPUs in order."""
    placed = {
        (index, member, position): engine * ranks_per_engine + position
        for index, engines in enumerate(sets)
        for member, engine in enumerate(engines)
        for position in range(ranks_per_engine)
    }
    on_trainers = {place: rank for place, rank in placed.items() if rank < world}
    return SharedGPUs(on_trainers, [rank // ranks_per_node for rank in range(world)])
