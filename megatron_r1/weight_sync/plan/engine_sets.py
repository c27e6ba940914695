"""The plan of a push to several equal engines at once: every slice is sent to one engine, and
equal ranks of the engines exchange the rest.

Engines are served in *sets* of at most `SET_ENGINES`. Within a set the ranks at one position, one
of each engine, need the same bytes. Each engine receives an equal part of them from trainer ranks
and passes its part on to the ranks at the same position of the others (`transports.exchange`). So
an engine rank has a few senders and one group, and a trainer rank sends its slices once per set
instead of once per engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.shared_gpus import NONE_SHARED, SAME_NODE_LOAD, SharedGPUs
from megatron_r1.weight_sync.plan.tensors import HFTensor, Region
from megatron_r1.weight_sync.plan.traffic import ByteCount
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantized

SET_ENGINES = 16
"""Most engines of a set. A larger one saves bytes out of the trainer, which has some to spare, and
costs time to create its groups, latency of their rings, and more engines that a death delays."""


LARGEST_PIECE, SMALL_PIECE = 0.5, 0.2
"""A sender is chosen for each piece of what an engine rank receives. LARGEST_PIECE: most of that
rank's bytes in one piece; with a half the busiest trainer rank of the recipe for 2,048 GPUs sends
1.17 times the mean in FP8, without a limit 1.25 times (without a drafter, and nodes aside).
SMALL_PIECE: a piece of less than this part of LARGEST_PIECE goes to a sender that is already
chosen."""
UNEVEN = 1 / 1024
"""A tensor is cut where an engine's share of the bytes ends, unless less than this part of the
share is left on either side. The exchange pads all shares to the largest."""
SHARED_MEMORY_LARGEST_PIECE = 1 / 16
"""`LARGEST_PIECE` in shared memory, where links cost nothing and each core that copies helps."""


class Part(NamedTuple):
    """A region of a tensor, and its bytes on the wire."""

    item: HFTensor
    region: Region
    num_bytes: int


@dataclass(frozen=True)
class Entry:
    """The part that enters engine rank `position` of engine `engine`, of the set, from `sender`.

    load: see `SharedGPUs.load`."""

    sender: int
    engine: int
    position: int
    parts: tuple[Part, ...]
    load: float

    @property
    def num_bytes(self) -> int:
        return _sum_bytes(self.parts)


def engine_sets(engines: int, max_engines: int = SET_ENGINES) -> list[range]:
    """Return the engines of each set of at most `max_engines`, in sets of nearly equal size."""
    num_sets = -(-engines // max_engines)
    edges = [engines * index // num_sets for index in range(num_sets + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def largest_piece(transport: str) -> float:
    """Return `LARGEST_PIECE` over a transport."""
    return SHARED_MEMORY_LARGEST_PIECE if transport in ("shm", "cuda_ipc") else LARGEST_PIECE


def entries(
    planner: Planner,
    num_bytes: ByteCount,
    sets: Sequence[range],
    sent: Sequence[float] = (),
    largest: float = LARGEST_PIECE,
    shared: SharedGPUs = NONE_SHARED,
) -> list[list[list[Entry]]]:
    """Return the entries of each set and position, in order of engine.

    sets: engines of each set; their number in `planner` is not used. sent: each trainer rank's
    load by other sets (`sender_loads`). largest: see `LARGEST_PIECE`. shared: a trainer rank sends
    to an engine rank on its GPU only what no other rank holds.

    Senders are chosen for the largest pieces first, each the one that is done first of the ranks
    that hold it; a small piece comes from a rank that sends to the same engine rank in any case.
    Every rank computes the same result."""
    parts_by_position = _held_parts(planner, num_bytes)
    pieces = [
        piece
        for size in {len(engines) for engines in sets}
        for position, held_parts in enumerate(parts_by_position)
        for piece in _pieces(held_parts, num_bytes, position, size, largest)
    ]
    pieces.sort(key=lambda p: (-p.num_bytes, p.engine, p.position, p.replicas.start, p.size))
    loads = list(sent) or [0.0] * planner.grid.world
    chosen: dict[tuple[int, int, int], dict[int, list[Part]]] = defaultdict(dict)
    for piece in pieces:
        for index, engines in enumerate(sets):
            if len(engines) == piece.size:
                receiver = index, piece.engine, piece.position
                senders = chosen[receiver]
                neighbour = shared.trainer_rank.get(receiver)
                holders: Sequence[int] = piece.replicas
                if neighbour in holders and len(holders) > 1:
                    holders = [rank for rank in holders if rank != neighbour]
                connected = [rank for rank in senders if rank in holders]
                candidates = connected if connected and piece.is_small else holders
                sender = min(candidates, key=loads.__getitem__)
                if near := shared.in_its_node(candidates, receiver):
                    nearest = min(near, key=loads.__getitem__)
                    saved = (1 - SAME_NODE_LOAD) * piece.num_bytes
                    sender = nearest if loads[nearest] < loads[sender] + saved else sender
                loads[sender] += shared.load(sender, receiver, piece.num_bytes)
                senders.setdefault(sender, []).extend(piece.parts)
    return [
        [
            [
                Entry(
                    *(sender, engine, position, tuple(parts)),
                    shared.load(sender, (index, engine, position), _sum_bytes(parts)),
                )
                for engine in range(len(engines))
                for sender, parts in chosen[index, engine, position].items()
            ]
            for position in range(len(parts_by_position))
        ]
        for index, engines in enumerate(sets)
    ]


def sender_loads(plan: Iterable[Iterable[Entry]], world: int) -> list[float]:
    """Return what the entries of a set take of each trainer rank's time, in bytes through its
    adapter: all that it sends, those within a node counted by `SAME_NODE_LOAD`."""
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


class _Piece(NamedTuple):
    """Parts that the same trainer ranks hold and that enter the same engine rank, of sets of `size`
    engines; is_small: whether it is a small part of what enters that rank."""

    num_bytes: int
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
        sizes: dict[Region, int] = {}
        for coordinate, region in needed:
            if region not in sizes:
                sizes[region] = num_bytes(item.name, item.rule.dtype, region)
            part = Part(item, region, sizes[region])
            found[engines.rank(coordinate)].setdefault(replicas, []).append(part)
    return found


def _pieces(
    held: _HeldParts, num_bytes: ByteCount, position: int, engines: int, largest: float
) -> Iterator[_Piece]:
    """Yield a position's pieces. Each engine gets an equal share of the bytes, up to `UNEVEN` of
    them or one block of rows; a piece has at most about `largest` of a share."""
    share = _sum_bytes(part for parts in held.values() for part in parts) / engines
    end = 0.0
    shares: list[_HeldParts] = [{} for _ in range(engines)]
    for replicas, parts in held.items():
        for part in parts:
            for cut in _cut_by_shares(part, end, share, num_bytes):
                engine = min(int((end + cut.num_bytes / 2) / share), engines - 1)
                shares[engine].setdefault(replicas, []).append(cut)
                end += cut.num_bytes
    for engine, engine_parts in enumerate(shares):
        for replicas, parts in engine_parts.items():
            for run in _runs(parts, share * largest):
                size = _sum_bytes(run)
                is_small = size < SMALL_PIECE * largest * share
                yield _Piece(size, engine, position, replicas, engines, is_small, run)


def _cut_by_shares(part: Part, start: float, share: float, num_bytes: ByteCount) -> Iterator[Part]:
    """Yield a part, which begins at byte `start` of its position, in pieces of whole rows, or
    of blocks of rows that have FP8 scales, that end about where engines' shares end."""
    item, region, size = part
    per_row = size / (region.bottom - region.top)
    least = UNEVEN * share / per_row
    step = BLOCK if is_quantized(item.name) else 1
    edges = [region.top]
    for number in range(int(start / share) + 1, int((start + size) / share) + 1):
        row = region.top + (number * share - start) / per_row
        row = round(row / step) * step
        if row - edges[-1] > least and region.bottom - row > least:
            edges.append(row)
    if len(edges) == 1:
        yield part
        return
    for top, bottom in pairwise([*edges, region.bottom]):
        rows = replace(region, top=top, bottom=bottom)
        yield Part(item, rows, num_bytes(item.name, item.rule.dtype, rows))


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


def _sum_bytes(parts: Iterable[Part]) -> int:
    return sum(part.num_bytes for part in parts)
