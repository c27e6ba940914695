"""The plan of a push to several equal engines at once: every slice is sent to one engine, and
equal ranks of the engines exchange the rest.

Engines are served in *sets* of at most `SET_ENGINES`. Within a set the ranks at one position, one
of each engine, need the same bytes. Each engine receives an equal part of them from trainer ranks
and passes its part on to the ranks at the same position of the others (`transports.gloo`). So
an engine rank has a few senders and one group, and a trainer rank sends its slices once per set
instead of once per engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

from megatron_r1.weight_sync.plan.bundles import (
    LARGEST_BUNDLE,
    Bundle,
    Part,
    bundles,
    held_parts,
    sum_bytes,
)
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.tensors import CountBytes

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

    Over NCCL that trainer rank receives for the engine rank (`rounds`), and senders are chosen
    without regard to nodes. With it `entries` prefers senders in the engine rank's node and avoids
    the one on its GPU: so `tools/plan` counts seconds."""

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


class SenderChoice:
    """A greedy choice: each bundle comes from the trainer rank that is done first with it. Given
    the largest bundles first, the small ones level out what is left.

    loads: each trainer rank's load by other sets, which grows by what it is chosen for. shared: see
    `entries`."""

    def __init__(self, loads: list[float], shared: SharedGPUs):
        self._loads, self._shared = loads, shared
        self.parts: dict[EngineRank, dict[int, list[Part]]] = defaultdict(dict)
        """parts[receiver][sender]: what is sent to an engine rank by a trainer rank."""

    def add(self, bundle: Bundle, receiver: EngineRank) -> None:
        """Choose the sender of a bundle to this engine rank."""
        parts_by_sender = self.parts[receiver]
        candidates = self._candidates(bundle, receiver, parts_by_sender)
        sender = self._first_done(candidates, receiver, bundle.num_bytes)
        self._loads[sender] += self._shared.load(sender, receiver, bundle.num_bytes)
        parts_by_sender.setdefault(sender, []).extend(bundle.parts)

    def _candidates(
        self, bundle: Bundle, receiver: EngineRank, connected: Iterable[int]
    ) -> Sequence[int]:
        """Return the trainer ranks that may send a bundle. connected: the senders that the engine
        rank has already."""
        holders: Sequence[int] = bundle.replicas
        neighbor = self._shared.trainer_rank.get(receiver)
        if neighbor in holders and len(holders) > 1:
            holders = [rank for rank in holders if rank != neighbor]
        if bundle.is_small:
            # A link costs more than its few bytes balance: with the least busy rank for every
            # bundle a rank of the recipe for 2,048 GPUs had 17 links, not 5 (docs/log.md).
            return [rank for rank in connected if rank in holders] or holders
        return holders

    def _first_done(self, candidates: Sequence[int], receiver: EngineRank, num_bytes: int) -> int:
        """Return the candidate that has sent `num_bytes` more to the engine rank first."""
        loads = self._loads
        sender = min(candidates, key=loads.__getitem__)
        near = self._shared.in_its_node(candidates, receiver)
        if not near:
            return sender
        # Within the node bytes take less of a rank's time, so a busier rank may be done first: at
        # 2,048 GPUs a push takes 1.19 times its floor instead of 1.21 (docs/log.md).
        nearest = min(near, key=loads.__getitem__)
        saved = (1 - SAME_NODE_LOAD) * num_bytes
        return nearest if loads[nearest] < loads[sender] + saved else sender


SET_ENGINES = 16
"""Most engines of a set. A larger one saves bytes out of the trainer, which has some to spare, and
costs time to create its groups, latency of their rings, and more engines that a death delays."""


@dataclass(frozen=True)
class Entry:
    """What one trainer rank sends to one engine rank: the parts that enter rank `position` of
    engine number `member` of the set from `sender`.

    load: see `SharedGPUs.load`."""

    sender: int
    member: int
    position: int
    parts: tuple[Part, ...]
    load: float

    @property
    def num_bytes(self) -> int:
        return sum_bytes(self.parts)


def engine_sets(num_engines: int, max_engines: int = SET_ENGINES) -> list[range]:
    """Return the engines of each set of at most `max_engines`, in sets of nearly equal size."""
    num_sets = -(-num_engines // max_engines)
    edges = [num_engines * index // num_sets for index in range(num_sets + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def entries(
    planner: Planner,
    count_bytes: CountBytes,
    sets: Sequence[range],
    sent: Sequence[float] = (),
    largest: float = LARGEST_BUNDLE,
    shared: SharedGPUs = NONE_SHARED,
) -> list[list[list[Entry]]]:
    """Return the entries of each set and position, in order of engine.

    sets: engines of each set; their number in `planner` is not used. sent: each trainer rank's
    load by other sets (`sender_loads`). largest: see `LARGEST_BUNDLE`. shared: a trainer rank sends
    to an engine rank on its GPU only what no other rank holds.

    Senders are chosen for the largest bundles first (`SenderChoice`). Every rank computes the same
    result."""
    parts_by_position = held_parts(planner, count_bytes)
    found = [
        bundle
        for num_engines in {len(engines) for engines in sets}
        for position, parts in enumerate(parts_by_position)
        for bundle in bundles(parts, count_bytes, position, num_engines, largest)
    ]
    found.sort(key=lambda b: (-b.num_bytes, b.member, b.position, b.replicas.start, b.num_engines))
    choice = SenderChoice(list(sent) or [0.0] * planner.grid.world, shared)
    for bundle in found:
        for index, engines in enumerate(sets):
            if len(engines) == bundle.num_engines:
                choice.add(bundle, (index, bundle.member, bundle.position))
    return [
        [
            list(_entries_at(choice, shared, index, len(engines), position))
            for position in range(len(parts_by_position))
        ]
        for index, engines in enumerate(sets)
    ]


def sender_loads(plan: Iterable[Iterable[Entry]], world: int) -> list[float]:
    """Return how long the entries of a set keep each trainer rank busy, in bytes through its
    adapter. Bytes to an engine rank in its own node count `SAME_NODE_LOAD` of a byte each."""
    loads = [0.0] * world
    for entry in chain.from_iterable(plan):
        loads[entry.sender] += entry.load
    return loads


def num_links(plans: Iterable[Iterable[Iterable[Entry]]], world: int) -> list[int]:
    """Return the number of engine ranks that each trainer rank sends to, in all sets."""
    links = [0] * world
    for entry in (entry for plan in plans for entry in chain.from_iterable(plan)):
        links[entry.sender] += 1
    return links


def _entries_at(
    choice: SenderChoice, shared: SharedGPUs, index: int, num_engines: int, position: int
) -> Iterator[Entry]:
    """Yield the entries of a position of set number `index`."""
    for member in range(num_engines):
        receiver = index, member, position
        for sender, parts in choice.parts[receiver].items():
            load = shared.load(sender, receiver, sum_bytes(parts))
            yield Entry(sender, member, position, tuple(parts), load)
