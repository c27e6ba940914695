"""The plan of a push to several equal engines at once: every slice is sent to one engine, and
equal ranks of the engines exchange the rest.

Engines are served in *sets* of at most `SET_ENGINES`. Within a set the ranks at one position, one
of each engine, need the same bytes. Each engine receives an equal part of them from trainer ranks
and passes its part on to the ranks at the same position of the others (`transports.exchange`). So
an engine rank has a few senders and one group, and a trainer rank sends its slices once per set
instead of once per engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.tensors import HFTensor, Region
from megatron_r1.weight_sync.plan.traffic import ByteCount

SET_ENGINES = 16
"""Most engines of a set. A larger one saves bytes out of the trainer, which has some to spare, and
costs time to create its groups, latency of their rings, and more engines that a death delays."""


LARGEST_PIECE, SMALL_PIECE = 0.5, 0.2
"""A sender is chosen for each piece of what an engine rank receives. LARGEST_PIECE: most of that
rank's bytes in one piece; with a half the busiest trainer rank of the recipe for 2,048 GPUs sends
1.15 times the mean, without a limit 1.4 times. SMALL_PIECE: a piece of less than this part of
LARGEST_PIECE goes to a sender that is already chosen."""
SHARED_MEMORY_LARGEST_PIECE = 1 / 16
"""`LARGEST_PIECE` in shared memory, where links cost nothing and each core that copies helps."""


Neighbours = Mapping[tuple[int, int, int], int]
"""(Set, engine of it, position) → the trainer rank on the same GPU, for the engine ranks that have
one. NCCL refuses such a pair, whose slices would go over gloo, at a thirtieth of the rate."""


class Part(NamedTuple):
    """A region of a tensor, and its bytes on the wire."""

    item: HFTensor
    region: Region
    num_bytes: float


@dataclass(frozen=True)
class Entry:
    """The part that enters engine rank `position` of engine `engine`, of the set, from `sender`."""

    sender: int
    engine: int
    position: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> float:
        return _sum_bytes(self.parts)


def engine_sets(engines: int, max_engines: int = SET_ENGINES) -> list[range]:
    """Return the engines of each set of at most `max_engines`, in sets of nearly equal size."""
    num_sets = -(-engines // max_engines)
    edges = [engines * index // num_sets for index in range(num_sets + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def neighbours_in_order(sets: Sequence[range], ranks_per_engine: int, world: int) -> Neighbours:
    """Return those of colocated engines whose ranks are on the trainer ranks' GPUs in order."""
    placed = {
        (index, member, position): engine * ranks_per_engine + position
        for index, engines in enumerate(sets)
        for member, engine in enumerate(engines)
        for position in range(ranks_per_engine)
    }
    return {place: rank for place, rank in placed.items() if rank < world}


def largest_piece(transport: str) -> float:
    """Return `LARGEST_PIECE` over a transport."""
    return SHARED_MEMORY_LARGEST_PIECE if transport in ("shm", "cuda_ipc") else LARGEST_PIECE


def entries(
    planner: Planner,
    num_bytes: ByteCount,
    sets: Sequence[range],
    sent: Sequence[float] = (),
    largest: float = LARGEST_PIECE,
    neighbours: Neighbours | None = None,
) -> list[list[list[Entry]]]:
    """Return the entries of each set and position, in order of engine.

    sets: engines of each set; their number in `planner` is not used. sent: bytes that each trainer
    rank sends to other sets. largest: see `LARGEST_PIECE`. neighbours: these send to an engine rank
    on their GPU only what no other rank holds.

    Senders are chosen for the largest pieces first, each the least busy of the ranks that hold it;
    a small piece comes from a rank that sends to the same engine rank in any case. Every rank
    computes the same result."""
    parts_by_position = _held_parts(planner, num_bytes)
    pieces = [
        piece
        for size in {len(engines) for engines in sets}
        for position, held_parts in enumerate(parts_by_position)
        for piece in _pieces(held_parts, position, size, largest)
    ]
    pieces.sort(key=lambda p: (-p.num_bytes, p.engine, p.position, p.replicas.start, p.size))
    load = list(sent) or [0.0] * planner.grid.world
    chosen: dict[tuple[int, int, int], dict[int, list[Part]]] = defaultdict(dict)
    for piece in pieces:
        for index, engines in enumerate(sets):
            if len(engines) == piece.size:
                senders = chosen[index, piece.position, piece.engine]
                neighbour = (neighbours or {}).get((index, piece.engine, piece.position))
                holders = [rank for rank in piece.replicas if rank != neighbour] or piece.replicas
                connected = [rank for rank in senders if rank in holders]
                candidates = connected if connected and piece.is_small else holders
                sender = min(candidates, key=load.__getitem__)
                load[sender] += piece.num_bytes
                senders.setdefault(sender, []).extend(piece.parts)
    return [
        [
            [
                Entry(sender, engine, position, tuple(parts))
                for engine in range(len(engines))
                for sender, parts in chosen[index, position, engine].items()
            ]
            for position in range(len(parts_by_position))
        ]
        for index, engines in enumerate(sets)
    ]


def sent_bytes(plan: Iterable[Iterable[Entry]], world: int) -> list[float]:
    """Return the bytes that each trainer rank sends to a set."""
    sent = [0.0] * world
    for entry in chain.from_iterable(plan):
        sent[entry.sender] += entry.num_bytes
    return sent


def num_links(plans: Iterable[Iterable[Iterable[Entry]]], world: int) -> list[int]:
    """Return the number of engine ranks that each trainer rank sends to, in all sets."""
    links = [0] * world
    for entry in (entry for plan in plans for entry in chain.from_iterable(plan)):
        links[entry.sender] += 1
    return links


class _Piece(NamedTuple):
    """Parts that the same trainer ranks hold and that enter the same engine rank, of sets of `size`
    engines; is_small: of all that enters it."""

    num_bytes: float
    engine: int
    position: int
    replicas: range
    size: int
    is_small: bool
    parts: list[Part]


_HeldParts = dict[range, list[Part]]
"""Parts by the trainer ranks that hold them, in order of pipeline stages."""


def _held_parts(planner: Planner, num_bytes: ByteCount) -> list[_HeldParts]:
    """Return what the rank at each position of an engine needs."""
    engines = planner.engines
    found: list[_HeldParts] = [{} for _ in range(engines.ranks_per_engine)]
    for item, replicas, needed in planner.shared_holdings():
        sizes: dict[Region, float] = {}
        for coordinate, region in needed:
            if region not in sizes:
                sizes[region] = num_bytes(item.name, item.rule.dtype, region)
            part = Part(item, region, sizes[region])
            found[engines.rank(coordinate)].setdefault(replicas, []).append(part)
    return found


def _pieces(held: _HeldParts, position: int, engines: int, largest: float) -> Iterator[_Piece]:
    """Yield the pieces of a position: consecutive parts, of each engine equal bytes up to half a
    tensor, at most about `largest` of them in a piece."""
    share = _sum_bytes(part for parts in held.values() for part in parts) / engines
    end = 0.0
    shares: list[_HeldParts] = [{} for _ in range(engines)]
    for replicas, parts in held.items():
        for part in parts:
            engine = min(int((end + part.num_bytes / 2) / share), engines - 1)
            shares[engine].setdefault(replicas, []).append(part)
            end += part.num_bytes
    for engine, engine_parts in enumerate(shares):
        for replicas, parts in engine_parts.items():
            for run in _runs(parts, share * largest):
                size = _sum_bytes(run)
                is_small = size < SMALL_PIECE * largest * share
                yield _Piece(size, engine, position, replicas, engines, is_small, run)


def _runs(parts: list[Part], limit: float) -> Iterator[list[Part]]:
    """Yield runs of consecutive parts with about `limit` bytes each."""
    run: list[Part] = []
    room = limit
    for part in parts:
        if run and room < part.num_bytes / 2:
            yield run
            run, room = [], limit
        run.append(part)
        room -= part.num_bytes
    yield run


def _sum_bytes(parts: Iterable[Part]) -> float:
    return sum(part.num_bytes for part in parts)
