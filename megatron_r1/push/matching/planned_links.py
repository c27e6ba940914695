"""The plan of a push: which trainer rank sends which regions to which engine rank.

Engines get a push in *sets* of at most `MAX_SET_ENGINES`. Within a set equal ranks of all engines
need the same bytes. Each engine gets an equal number of these bytes from trainer ranks (a scatter)
and relays them to the same rank of the others (an all-gather). So an engine rank has a few senders,
and a trainer rank sends its regions once per set instead of once per engine. The regions that an
engine rank gets from trainer ranks are grouped by the ranks that hold them; a group has a limited
size and comes from one trainer rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple

from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.models.weights.formats.published_layout import FP8_BLOCK_SIZE, is_quantized
from megatron_r1.push.matching.matched_regions import MatchedRegions
from megatron_r1.push.matching.regions import Region
from megatron_r1.push.matching.tensors import CountBytes, HFTensor

MAX_SET_ENGINES = 16
"""Most engines of a set. A larger one saves bytes out of the trainer, which has some to spare, and
costs time to create its groups, latency of their rings, and more engines that a death delays."""
MAX_GROUP_FRACTION = 0.5
"""Most of what an engine rank gets from trainer ranks in one group of regions. With a half the
busiest trainer rank of the recipe for 2,048 GPUs sends 1.17 times the mean in FP8, without a limit
1.25 times (no drafter)."""
SHARED_MEMORY_MAX_GROUP_FRACTION = 1 / 16
"""`MAX_GROUP_FRACTION` in shared memory, where links cost nothing and each copying core helps."""
SMALL_GROUP_FRACTION = 0.2
"""A group of less than this fraction of the largest one's bytes is small: it comes from a trainer
rank that is already chosen."""
MIN_SPLIT_FRACTION = 1 / 1024
"""A tensor is split where an engine has its bytes, unless less than this fraction of them is left
on either side. Relays take as long as for the engine with most bytes."""

EngineRankId = tuple[int, int, int]
"""(set, member, engine rank): the engine is number `member` of the set."""


class TensorRegion(NamedTuple):
    """A region with its tensor and its bytes on the wire.

    Attributes:
        tensor: the HF tensor.
        region: rows and columns of it.
        num_bytes: in the engine's dtype."""

    tensor: HFTensor
    region: Region
    num_bytes: int


@dataclass(frozen=True)
class PlannedLink:
    """What one trainer rank sends to one engine rank.

    Attributes:
        trainer_rank: the sender.
        member: the engine, by its number in the set.
        engine_rank: the rank within the engine.
        regions: what is sent."""

    trainer_rank: int
    member: int
    engine_rank: int
    regions: tuple[TensorRegion, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one push over the link."""
        return total_bytes(self.regions)


EngineSetPlan = list[list[PlannedLink]]
"""The links of a set, by engine rank."""
RegionsByReplicas = dict[range, list[TensorRegion]]
"""Regions by the trainer ranks that hold them, in order of pipeline stages."""


class _RegionGroup(NamedTuple):
    """Regions that come from one trainer rank: any of `replicas`, which all hold them. They go to
    rank `engine_rank` of engine number `member` of every set of `num_engines` engines.

    Attributes:
        num_bytes: bytes of the regions on the wire.
        member: the engine, by its number in a set.
        engine_rank: the rank within the engine.
        replicas: trainer ranks, each of which holds all regions.
        num_engines: the size of the sets that the group is planned for.
        is_small: whether it should come from a trainer rank that sends to the engine rank anyway.
        regions: what the trainer rank sends."""

    num_bytes: int
    member: int
    engine_rank: int
    replicas: range
    num_engines: int
    is_small: bool
    regions: list[TensorRegion]


def engine_sets(num_engines: int, max_engines: int = MAX_SET_ENGINES) -> list[range]:
    """Return the engines of each set of at most `max_engines`, in sets of nearly equal size."""
    num_sets = -(-num_engines // max_engines)
    edges = [num_engines * index // num_sets for index in range(num_sets + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def colocated_trainer_ranks(
    sets: Sequence[range], ranks_per_engine: int, world_size: int
) -> dict[EngineRankId, int]:
    """Return the trainer rank on each engine rank's GPU, where engine ranks are on the trainer
    ranks' GPUs in order.

    Args:
        sets: engines of each set, by number.
        ranks_per_engine: the ranks of an engine.
        world_size: the trainer ranks."""
    trainer_rank_of = {
        (index, member, engine_rank): engine * ranks_per_engine + engine_rank
        for index, engines in enumerate(sets)
        for member, engine in enumerate(engines)
        for engine_rank in range(ranks_per_engine)
    }
    return {engine: rank for engine, rank in trainer_rank_of.items() if rank < world_size}


def max_group_fraction(transport: str) -> float:
    """Return `MAX_GROUP_FRACTION` over a transport."""
    return (
        SHARED_MEMORY_MAX_GROUP_FRACTION
        if TRANSPORTS[transport].is_single_node
        else MAX_GROUP_FRACTION
    )


def plan_sets(
    region_matches: MatchedRegions,
    count_bytes: CountBytes,
    sets: Sequence[range],
    sent_bytes: Sequence[float] = (),
    max_fraction: float = MAX_GROUP_FRACTION,
) -> list[EngineSetPlan]:
    """Return the plan of each set; every rank computes the same.

    Each group of regions comes from the trainer rank that has sent least by then. The
    largest are first, so that the small ones level out what is left.

    Args:
        region_matches: what the trainer ranks hold and engine ranks need.
        count_bytes: counts the bytes of a region on the wire.
        sets: engines of each set; their number in `region_matches` is not used.
        sent_bytes: what each trainer rank sends to other sets.
        max_fraction: the most of an engine rank's bytes in a group (`MAX_GROUP_FRACTION`).
    """
    by_engine_rank = needed_regions(region_matches, count_bytes)
    groups = [
        group
        for num_engines in {len(engines) for engines in sets}
        for engine_rank, by_replicas in enumerate(by_engine_rank)
        for group in _region_groups(
            by_replicas, count_bytes, engine_rank, num_engines, max_fraction
        )
    ]
    groups.sort(
        key=lambda g: (-g.num_bytes, g.member, g.engine_rank, g.replicas.start, g.num_engines)
    )
    loads = list(sent_bytes) or [0.0] * region_matches.grid.world_size
    link_regions: dict[EngineRankId, dict[int, list[TensorRegion]]] = defaultdict(dict)
    for group in groups:
        for index, engines in enumerate(sets):
            if len(engines) == group.num_engines:
                by_trainer_rank = link_regions[index, group.member, group.engine_rank]
                candidates: Sequence[int] = group.replicas
                if group.is_small:
                    # A link costs more than its few bytes balance: with the least busy rank for
                    # every group a rank of the recipe for 2,048 GPUs had 17 links
                    # (docs/learned.md).
                    candidates = [r for r in by_trainer_rank if r in group.replicas] or candidates
                trainer_rank = min(candidates, key=loads.__getitem__)
                loads[trainer_rank] += group.num_bytes
                by_trainer_rank.setdefault(trainer_rank, []).extend(group.regions)
    return [
        [
            [
                PlannedLink(trainer_rank, member, engine_rank, tuple(regions))
                for member in range(len(engines))
                for trainer_rank, regions in link_regions[index, member, engine_rank].items()
            ]
            for engine_rank in range(len(by_engine_rank))
        ]
        for index, engines in enumerate(sets)
    ]


def sent_bytes(plan: EngineSetPlan, world_size: int) -> list[float]:
    """Return the bytes that each trainer rank sends to a set."""
    bytes_by_rank = [0.0] * world_size
    for link in chain.from_iterable(plan):
        bytes_by_rank[link.trainer_rank] += link.num_bytes
    return bytes_by_rank


def links_per_rank(plans: Iterable[EngineSetPlan], world_size: int) -> list[int]:
    """Return the number of engine ranks that each trainer rank sends to, in all sets.

    Args:
        plans: the plans of all sets.
        world_size: the trainer ranks.
    """
    links = [0] * world_size
    for link in (link for plan in plans for link in chain.from_iterable(plan)):
        links[link.trainer_rank] += 1
    return links


def needed_regions(
    region_matches: MatchedRegions, count_bytes: CountBytes
) -> list[RegionsByReplicas]:
    """Return what each rank of an engine needs."""
    regions_of_ranks: list[RegionsByReplicas] = [
        {} for _ in range(region_matches.layout.ranks_per_engine)
    ]
    for tensor, replicas, sent_regions in region_matches.sent_regions():
        for region, ranks in sent_regions:
            num_bytes = count_bytes(tensor.name, tensor.rule.dtype, region)
            tensor_region = TensorRegion(tensor, region, num_bytes)
            for rank in ranks:
                regions_of_ranks[rank].setdefault(replicas, []).append(tensor_region)
    return regions_of_ranks


def total_bytes(regions: Iterable[TensorRegion]) -> int:
    """Return the bytes of all regions on the wire."""
    return sum(region.num_bytes for region in regions)


def _region_groups(
    rank_regions: RegionsByReplicas,
    count_bytes: CountBytes,
    engine_rank: int,
    num_engines: int,
    max_fraction: float,
) -> Iterator[_RegionGroup]:
    """Yield the groups of regions of an engine rank, for sets of `num_engines` engines.

    Each engine gets an equal part of the bytes, up to `MIN_SPLIT_FRACTION` of them or one block of
    rows; a group has at most about `max_fraction` of it.

    Args:
        rank_regions: the regions that an engine rank needs, by trainer ranks.
        count_bytes: counts the bytes of a region on the wire.
        engine_rank: the rank within the engine.
        num_engines: the engines of the set.
        max_fraction: the most of an engine's bytes in a group."""
    per_engine = total_bytes(chain.from_iterable(rank_regions.values())) / num_engines
    for member, by_replicas in enumerate(
        _divide_by_engine(rank_regions, count_bytes, num_engines, per_engine)
    ):
        for replicas, regions in by_replicas.items():
            for run in _split_by_bytes(regions, per_engine * max_fraction):
                size = total_bytes(run)
                is_small = size < SMALL_GROUP_FRACTION * max_fraction * per_engine
                yield _RegionGroup(size, member, engine_rank, replicas, num_engines, is_small, run)


def _divide_by_engine(
    rank_regions: RegionsByReplicas, count_bytes: CountBytes, num_engines: int, per_engine: float
) -> list[RegionsByReplicas]:
    """Return the regions that each engine gets from trainer ranks, about `per_engine` bytes.

    Args:
        rank_regions: the regions that an engine rank needs, by trainer ranks.
        count_bytes: counts the bytes of a region on the wire.
        num_engines: the engines of the set.
        per_engine: the bytes that each of them gets."""
    by_engine: list[RegionsByReplicas] = [{} for _ in range(num_engines)]
    end = 0.0
    for replicas, regions in rank_regions.items():
        for region in regions:
            for part in _split_at_engine_ends(region, end, per_engine, count_bytes):
                # By its middle: a part is rounded to rows, so its ends may be another engine's.
                member = min(int((end + part.num_bytes / 2) / per_engine), num_engines - 1)
                by_engine[member].setdefault(replicas, []).append(part)
                end += part.num_bytes
    return by_engine


def _split_at_engine_ends(
    tensor_region: TensorRegion, start: float, per_engine: float, count_bytes: CountBytes
) -> Iterator[TensorRegion]:
    """Yield a region in parts that end about where the bytes of an engine end.

    Parts are of whole rows, of a tensor with FP8 scales of whole blocks of rows.

    Args:
        tensor_region: the region to split.
        start: its first byte among all that the engine rank needs.
        per_engine: the bytes that each engine gets.
        count_bytes: counts the bytes of a region on the wire."""
    tensor, region, size = tensor_region
    end_numbers = range(int(start / per_engine) + 1, int((start + size) / per_engine) + 1)
    if not end_numbers:  # as in most regions
        yield tensor_region
        return
    per_row = size / (region.bottom - region.top)
    min_rows = MIN_SPLIT_FRACTION * per_engine / per_row
    step = FP8_BLOCK_SIZE if is_quantized(tensor.name) else 1
    edges = [region.top]
    for number in end_numbers:
        row = region.top + (number * per_engine - start) / per_row
        row = round(row / step) * step
        if row - edges[-1] > min_rows and region.bottom - row > min_rows:
            edges.append(row)
    if len(edges) == 1:
        yield tensor_region
        return
    for top, bottom in pairwise([*edges, region.bottom]):
        rows = replace(region, top=top, bottom=bottom)
        yield TensorRegion(tensor, rows, count_bytes(tensor.name, tensor.rule.dtype, rows))


def _split_by_bytes(regions: list[TensorRegion], limit: float) -> Iterator[list[TensorRegion]]:
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
