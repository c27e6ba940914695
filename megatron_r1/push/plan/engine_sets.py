"""The plan of a push: which trainer rank sends which regions to which engine rank.

Engines get a push in *sets* of at most `SET_ENGINES`. Within a set the ranks at one position, one
of each engine, need the same bytes. Each engine gets an equal number of these bytes from trainer
ranks and relays them to the ranks at the same position of the others. So an engine rank has a few
senders, and a trainer rank sends its slices once per set instead of once per engine. What enters an
engine is divided by the trainer ranks that hold it into *shares* of a limited size, which come from
one sender each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.weights.stored.published import BLOCK, is_quantized
from megatron_r1.push.plan.planner import Planner
from megatron_r1.push.plan.tensors import CountBytes, HFTensor, Region

SET_ENGINES = 16
"""Most engines of a set. A larger one saves bytes out of the trainer, which has some to spare, and
costs time to create its groups, latency of their rings, and more engines that a death delays."""
LARGEST_FRACTION = 0.5
"""Most of what enters an engine rank in one share. With a half the busiest trainer rank of the
recipe for 2,048 GPUs sends 1.17 times the mean in FP8, without a limit 1.25 times (no drafter)."""
SHARED_MEMORY_LARGEST_FRACTION = 1 / 16
"""`LARGEST_FRACTION` in shared memory, where links cost nothing and each core that copies helps."""
SMALL_FRACTION = 0.2
"""A share of less than this fraction of the largest one's bytes is small: it goes to a sender that
is already chosen."""
UNEVEN = 1 / 1024
"""A tensor is cut where an engine has its bytes, unless less than this fraction of them is left on
either side. Relays take as long as for the engine with most bytes."""

EngineRank = tuple[int, int, int]
"""(set, member, position): the engine is number `member` of the set."""


class TensorRegion(NamedTuple):
    """A region with its tensor and its bytes on the wire."""

    tensor: HFTensor
    region: Region
    num_bytes: int


@dataclass(frozen=True)
class PlannedLink:
    """What one trainer rank sends to one engine rank: the regions that rank `position` of engine
    number `member` of the set gets from `sender`."""

    sender: int
    member: int
    position: int
    regions: tuple[TensorRegion, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one push over the link."""
        return sum_bytes(self.regions)


Plan = list[list[PlannedLink]]
"""The links of a set, by position."""
HeldRegions = dict[range, list[TensorRegion]]
"""Regions by the trainer ranks that hold them, in order of pipeline stages."""


class _Share(NamedTuple):
    """Regions that come from one sender: all ranks of `replicas` hold them, and they enter rank
    `position` of engine number `member` of every set of `num_engines` engines."""

    num_bytes: int
    member: int
    position: int
    replicas: range
    num_engines: int
    is_small: bool
    regions: list[TensorRegion]


def engine_sets(num_engines: int, max_engines: int = SET_ENGINES) -> list[range]:
    """Return the engines of each set of at most `max_engines`, in sets of nearly equal size."""
    num_sets = -(-num_engines // max_engines)
    edges = [num_engines * index // num_sets for index in range(num_sets + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def ranks_in_order(
    sets: Sequence[range], ranks_per_engine: int, world_size: int
) -> dict[EngineRank, int]:
    """Return the trainer rank on each engine rank's GPU, where engine ranks are on the trainer
    ranks' GPUs in order."""
    placed = {
        (index, member, position): engine * ranks_per_engine + position
        for index, engines in enumerate(sets)
        for member, engine in enumerate(engines)
        for position in range(ranks_per_engine)
    }
    return {place: rank for place, rank in placed.items() if rank < world_size}


def largest_fraction(transport: str) -> float:
    """Return `LARGEST_FRACTION` over a transport."""
    return SHARED_MEMORY_LARGEST_FRACTION if TRANSPORTS[transport].one_host else LARGEST_FRACTION


def plan_sets(
    planner: Planner,
    count_bytes: CountBytes,
    sets: Sequence[range],
    sent: Sequence[float] = (),
    largest: float = LARGEST_FRACTION,
) -> list[Plan]:
    """Return the plan of each set; every rank computes the same.

    Each share comes from the trainer rank that has sent least by then. The largest are first, so
    that the small ones level out what is left.

    Args:
        planner: what the trainer ranks hold and engine ranks need.
        count_bytes: counts the bytes of a region on the wire.
        sets: engines of each set; their number in `planner` is not used.
        sent: the bytes that each trainer rank sends to other sets.
        largest: the most of an engine rank's bytes in a share (`LARGEST_FRACTION`).
    """
    needed = needed_regions(planner, count_bytes)
    shares = [
        share
        for num_engines in {len(engines) for engines in sets}
        for position, held in enumerate(needed)
        for share in _shares(held, count_bytes, position, num_engines, largest)
    ]
    shares.sort(key=lambda s: (-s.num_bytes, s.member, s.position, s.replicas.start, s.num_engines))
    loads = list(sent) or [0.0] * planner.grid.world_size
    chosen: dict[EngineRank, dict[int, list[TensorRegion]]] = defaultdict(dict)
    for share in shares:
        for index, engines in enumerate(sets):
            if len(engines) == share.num_engines:
                by_sender = chosen[index, share.member, share.position]
                candidates: Sequence[int] = share.replicas
                if share.is_small:
                    # A link costs more than its few bytes balance: with the least busy rank for
                    # every share a rank of the recipe for 2,048 GPUs had 17 links
                    # (docs/learned.md).
                    candidates = [r for r in by_sender if r in share.replicas] or candidates
                sender = min(candidates, key=loads.__getitem__)
                loads[sender] += share.num_bytes
                by_sender.setdefault(sender, []).extend(share.regions)
    return [
        [
            [
                PlannedLink(sender, member, position, tuple(regions))
                for member in range(len(engines))
                for sender, regions in chosen[index, member, position].items()
            ]
            for position in range(len(needed))
        ]
        for index, engines in enumerate(sets)
    ]


def sent_bytes(plan: Plan, world_size: int) -> list[float]:
    """Return the bytes that each trainer rank sends to a set."""
    sent = [0.0] * world_size
    for link in chain.from_iterable(plan):
        sent[link.sender] += link.num_bytes
    return sent


def num_links(plans: Iterable[Plan], world_size: int) -> list[int]:
    """Return the number of engine ranks that each trainer rank sends to, in all sets.

    Args:
        plans: the plans of all sets.
        world_size: the trainer ranks.
    """
    links = [0] * world_size
    for link in (link for plan in plans for link in chain.from_iterable(plan)):
        links[link.sender] += 1
    return links


def needed_regions(planner: Planner, count_bytes: CountBytes) -> list[HeldRegions]:
    """Return what the rank at each position of an engine needs."""
    found: list[HeldRegions] = [{} for _ in range(planner.engines.ranks_per_engine)]
    for tensor, replicas, needed in planner.sent_regions():
        for region, ranks in needed:
            num_bytes = count_bytes(tensor.name, tensor.rule.dtype, region)
            for rank in ranks:
                regions = found[rank].setdefault(replicas, [])
                regions.append(TensorRegion(tensor, region, num_bytes))
    return found


def sum_bytes(regions: Iterable[TensorRegion]) -> int:
    """Return the bytes of all regions."""
    return sum(region.num_bytes for region in regions)


def _shares(
    needed: HeldRegions, count_bytes: CountBytes, position: int, num_engines: int, largest: float
) -> Iterator[_Share]:
    """Yield a position's shares, for sets of `num_engines` engines.

    Each engine gets an equal part of the bytes, up to `UNEVEN` of them or one block of rows; a
    share has at most about `largest` of it."""
    per_engine = sum_bytes(chain.from_iterable(needed.values())) / num_engines
    for member, entering in enumerate(_by_engine(needed, count_bytes, num_engines, per_engine)):
        for replicas, regions in entering.items():
            for run in _runs(regions, per_engine * largest):
                size = sum_bytes(run)
                is_small = size < SMALL_FRACTION * largest * per_engine
                yield _Share(size, member, position, replicas, num_engines, is_small, run)


def _by_engine(
    needed: HeldRegions, count_bytes: CountBytes, num_engines: int, per_engine: float
) -> list[HeldRegions]:
    """Return the regions of a position that enter each engine, about `per_engine` bytes."""
    entering: list[HeldRegions] = [{} for _ in range(num_engines)]
    end = 0.0
    for replicas, regions in needed.items():
        for region in regions:
            for cut in _cut_by_engine(region, end, per_engine, count_bytes):
                # By its middle: a cut is rounded to rows, so its ends may be another engine's.
                member = min(int((end + cut.num_bytes / 2) / per_engine), num_engines - 1)
                entering[member].setdefault(replicas, []).append(cut)
                end += cut.num_bytes
    return entering


def _cut_by_engine(
    whole: TensorRegion, start: float, per_engine: float, count_bytes: CountBytes
) -> Iterator[TensorRegion]:
    """Yield a region, which begins at byte `start` of its position, in cuts of whole rows that end
    about where an engine has its bytes; of a tensor with FP8 scales, in cuts of whole blocks of
    rows."""
    tensor, region, size = whole
    per_row = size / (region.bottom - region.top)
    least = UNEVEN * per_engine / per_row
    step = BLOCK if is_quantized(tensor.name) else 1
    edges = [region.top]
    for number in range(int(start / per_engine) + 1, int((start + size) / per_engine) + 1):
        row = region.top + (number * per_engine - start) / per_row
        row = round(row / step) * step
        if row - edges[-1] > least and region.bottom - row > least:
            edges.append(row)
    if len(edges) == 1:
        yield whole
        return
    for top, bottom in pairwise([*edges, region.bottom]):
        rows = replace(region, top=top, bottom=bottom)
        yield TensorRegion(tensor, rows, count_bytes(tensor.name, tensor.rule.dtype, rows))


def _runs(regions: list[TensorRegion], limit: float) -> Iterator[list[TensorRegion]]:
    """Yield runs of consecutive regions with about `limit` bytes each."""
    run: list[TensorRegion] = []
    room = limit
    for region in regions:
        if run and room < region.num_bytes / 2:
            yield run
            run, room = [], limit
        run.append(region)
        room -= region.num_bytes
    yield run
