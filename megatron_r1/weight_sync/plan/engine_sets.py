"""The plan of a push to several equal engines at once: every slice is sent to one engine, and
equal ranks of the engines exchange the rest.

Engines are served in *sets* of at most `SET_ENGINES`. Within a set the ranks at one position, one
of each engine, need the same bytes. Each engine receives an equal part of them from trainer ranks
and passes its part on to the ranks at the same position of the others (`transports.exchange`). So
an engine rank has a few senders and one group, and a trainer rank sends its slices once per set
instead of once per engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from megatron_r1.weight_sync.plan.bundles import (
    LARGEST_BUNDLE,
    Part,
    bundles,
    held_parts,
    sum_bytes,
)
from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.sender_choice import SenderChoice
from megatron_r1.weight_sync.plan.shared_gpus import NONE_SHARED, SharedGPUs
from megatron_r1.weight_sync.plan.traffic import CountBytes

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
