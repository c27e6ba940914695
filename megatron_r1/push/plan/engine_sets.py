"""The plan of a push: which trainer rank sends which regions to which engine rank.

Engines are served in *sets* of at most `SET_ENGINES`. Within a set the ranks at one position, one
of each engine, need the same bytes. These are cut into equal *shares*, one for each engine, which
enter it from trainer ranks and are passed on to the ranks at the same position of the others. So an
engine rank has a few senders, and a trainer rank sends its slices once per set instead of once per
engine. A share is divided by the trainer ranks that hold it, and then into *bundles* of a limited
size, which come from one sender each."""

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
LARGEST_BUNDLE = 0.5
"""Most of an engine rank's share in one bundle. With a half the busiest trainer rank of the recipe
for 2,048 GPUs sends 1.17 times the mean in FP8, without a limit 1.25 times (without a drafter)."""
SHARED_MEMORY_LARGEST_BUNDLE = 1 / 16
"""`LARGEST_BUNDLE` in shared memory, where links cost nothing and each core that copies helps."""
SMALL_BUNDLE = 0.2
"""A bundle of less than this part of the largest one's bytes is small: it goes to a sender that is
already chosen."""
UNEVEN = 1 / 1024
"""A tensor is cut where an engine's share of the bytes ends, unless less than this part of the
share is left on either side. An exchange takes as long as for the largest share."""

EngineRank = tuple[int, int, int]
"""(set, member, position): the engine is number `member` of the set."""


class Part(NamedTuple):
    """A region of a tensor, and its bytes on the wire."""

    item: HFTensor
    region: Region
    num_bytes: int


@dataclass(frozen=True)
class Entry:
    """What one trainer rank sends to one engine rank: the parts that enter rank `position` of
    engine number `member` of the set from `sender`."""

    sender: int
    member: int
    position: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum_bytes(self.parts)


Plan = list[list[Entry]]
"""The entries of a set, by position."""
HeldParts = dict[range, list[Part]]
"""Parts by the trainer ranks that hold them, in order of pipeline stages."""


class _Bundle(NamedTuple):
    """Parts that come from one sender: all ranks of `replicas` hold them, and they enter engine
    rank `position` of engine number `member` of every set of `num_engines` engines."""

    num_bytes: int
    member: int
    position: int
    replicas: range
    num_engines: int
    is_small: bool
    parts: list[Part]


def engine_sets(num_engines: int, max_engines: int = SET_ENGINES) -> list[range]:
    """Return the engines of each set of at most `max_engines`, in sets of nearly equal size."""
    num_sets = -(-num_engines // max_engines)
    edges = [num_engines * index // num_sets for index in range(num_sets + 1)]
    return [range(*edge) for edge in pairwise(edges)]


def ranks_in_order(
    sets: Sequence[range], ranks_per_engine: int, world: int
) -> dict[EngineRank, int]:
    """Return the trainer rank on each engine rank's GPU, where engine ranks are on the trainer
    ranks' GPUs in order."""
    placed = {
        (index, member, position): engine * ranks_per_engine + position
        for index, engines in enumerate(sets)
        for member, engine in enumerate(engines)
        for position in range(ranks_per_engine)
    }
    return {place: rank for place, rank in placed.items() if rank < world}


def largest_bundle(transport: str) -> float:
    """Return `LARGEST_BUNDLE` over a transport."""
    return SHARED_MEMORY_LARGEST_BUNDLE if TRANSPORTS[transport].one_host else LARGEST_BUNDLE


def entries(
    planner: Planner,
    count_bytes: CountBytes,
    sets: Sequence[range],
    sent: Sequence[float] = (),
    largest: float = LARGEST_BUNDLE,
) -> list[Plan]:
    """Return the plan of each set; every rank computes the same.

    Each bundle comes from the trainer rank that has sent least by then. The largest are first, so
    that the small ones level out what is left.

    Args:
        planner: what the trainer ranks hold and engine ranks need.
        count_bytes: counts the bytes of a region on the wire.
        sets: engines of each set; their number in `planner` is not used.
        sent: the bytes that each trainer rank sends to other sets.
        largest: the largest share of a bundle (`LARGEST_BUNDLE`).
    """
    held = held_parts(planner, count_bytes)
    found = [
        bundle
        for num_engines in {len(engines) for engines in sets}
        for position, parts in enumerate(held)
        for bundle in _bundles(parts, count_bytes, position, num_engines, largest)
    ]
    found.sort(key=lambda b: (-b.num_bytes, b.member, b.position, b.replicas.start, b.num_engines))
    loads = list(sent) or [0.0] * planner.grid.world
    chosen: dict[EngineRank, dict[int, list[Part]]] = defaultdict(dict)
    for bundle in found:
        for index, engines in enumerate(sets):
            if len(engines) == bundle.num_engines:
                by_sender = chosen[index, bundle.member, bundle.position]
                candidates: Sequence[int] = bundle.replicas
                if bundle.is_small:
                    # A link costs more than its few bytes balance: with the least busy rank for
                    # every bundle a rank of the recipe for 2,048 GPUs had 17 links
                    # (docs/learned.md).
                    candidates = [r for r in by_sender if r in bundle.replicas] or candidates
                sender = min(candidates, key=loads.__getitem__)
                loads[sender] += bundle.num_bytes
                by_sender.setdefault(sender, []).extend(bundle.parts)
    return [
        [
            [
                Entry(sender, member, position, tuple(parts))
                for member in range(len(engines))
                for sender, parts in chosen[index, member, position].items()
            ]
            for position in range(len(held))
        ]
        for index, engines in enumerate(sets)
    ]


def sent_bytes(plan: Plan, world: int) -> list[float]:
    """Return the bytes that each trainer rank sends to a set."""
    sent = [0.0] * world
    for entry in chain.from_iterable(plan):
        sent[entry.sender] += entry.num_bytes
    return sent


def num_links(plans: Iterable[Plan], world: int) -> list[int]:
    """Return the number of engine ranks that each trainer rank sends to, in all sets.

    Args:
        plans: the plans of all sets.
        world: the trainer ranks.
    """
    links = [0] * world
    for entry in (entry for plan in plans for entry in chain.from_iterable(plan)):
        links[entry.sender] += 1
    return links


def held_parts(planner: Planner, count_bytes: CountBytes) -> list[HeldParts]:
    """Return what the rank at each position of an engine needs."""
    found: list[HeldParts] = [{} for _ in range(planner.engines.ranks_per_engine)]
    for item, replicas, needed in planner.sent_regions():
        for region, ranks in needed:
            part = Part(item, region, count_bytes(item.name, item.rule.dtype, region))
            for rank in ranks:
                found[rank].setdefault(replicas, []).append(part)
    return found


def sum_bytes(parts: Iterable[Part]) -> int:
    """Return the bytes of all parts."""
    return sum(part.num_bytes for part in parts)


def _bundles(
    held: HeldParts, count_bytes: CountBytes, position: int, num_engines: int, largest: float
) -> Iterator[_Bundle]:
    """Yield a position's bundles, for sets of `num_engines` engines.

    Each engine gets an equal share of the bytes, up to `UNEVEN` of them or one block of rows; a
    bundle has at most about `largest` of a share."""
    share = sum_bytes(chain.from_iterable(held.values())) / num_engines
    for member, of_member in enumerate(_shares(held, count_bytes, num_engines, share)):
        for replicas, parts in of_member.items():
            for run in _runs(parts, share * largest):
                size = sum_bytes(run)
                is_small = size < SMALL_BUNDLE * largest * share
                yield _Bundle(size, member, position, replicas, num_engines, is_small, run)


def _shares(
    held: HeldParts, count_bytes: CountBytes, num_engines: int, share: float
) -> list[HeldParts]:
    """Return each engine's share of the parts that a position needs, about `share` bytes."""
    shares: list[HeldParts] = [{} for _ in range(num_engines)]
    end = 0.0
    for replicas, parts in held.items():
        for part in parts:
            for cut in _cut_by_shares(part, end, share, count_bytes):
                # By its middle: a cut is rounded to rows, so its ends may be in other shares.
                member = min(int((end + cut.num_bytes / 2) / share), num_engines - 1)
                shares[member].setdefault(replicas, []).append(cut)
                end += cut.num_bytes
    return shares


def _cut_by_shares(
    part: Part, start: float, share: float, count_bytes: CountBytes
) -> Iterator[Part]:
    """Yield a part, which begins at byte `start` of its position, in cuts of whole rows that end
    about where engines' shares end; of a tensor with FP8 scales, in cuts of whole blocks of rows.
    """
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
        yield Part(item, rows, count_bytes(item.name, item.rule.dtype, rows))


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
