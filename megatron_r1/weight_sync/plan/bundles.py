"""What enters each engine rank from trainer ranks, in bundles that come from one sender each.

The bytes that a position needs are cut into equal *shares*, one for each engine of a set. A share
is divided by the trainer ranks that hold it, and then into bundles of a limited size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from megatron_r1.weight_sync.plan.planner import Planner
from megatron_r1.weight_sync.plan.tensors import CountBytes, HFTensor, Region
from megatron_r1.weights.stored.fp8 import BLOCK, is_quantized

LARGEST_BUNDLE = 0.5
"""Most of an engine rank's share in one bundle. With a half the busiest trainer rank of the recipe
for 2,048 GPUs sends 1.17 times the mean in FP8, without a limit 1.25 times (without a drafter, and
nodes aside)."""
SHARED_MEMORY_LARGEST_BUNDLE = 1 / 16
"""`LARGEST_BUNDLE` in shared memory, where links cost nothing and each core that copies helps."""
SMALL_BUNDLE = 0.2
"""A bundle of less than this part of the largest one's bytes is small: it goes to a sender that is
already chosen."""
UNEVEN = 1 / 1024
"""A tensor is cut where an engine's share of the bytes ends, unless less than this part of the
share is left on either side. The exchange pads all shares to the largest."""


class Part(NamedTuple):
    """A region of a tensor, and its bytes on the wire."""

    item: HFTensor
    region: Region
    num_bytes: int


class Bundle(NamedTuple):
    """Parts that come from one sender: all ranks of `replicas` hold them, and they enter engine
    rank `position` of engine number `member` of every set of `num_engines` engines.

    is_small: see `SMALL_BUNDLE`."""

    num_bytes: int
    member: int
    position: int
    replicas: range
    num_engines: int
    is_small: bool
    parts: list[Part]


HeldParts = dict[range, list[Part]]
"""Parts by the trainer ranks that hold them, in order of pipeline stages."""


def largest_bundle(transport: str) -> float:
    """Return `LARGEST_BUNDLE` over a transport."""
    return SHARED_MEMORY_LARGEST_BUNDLE if transport in ("shm", "cuda_ipc") else LARGEST_BUNDLE


def held_parts(planner: Planner, count_bytes: CountBytes) -> list[HeldParts]:
    """Return what the rank at each position of an engine needs."""
    engines = planner.engines
    found: list[HeldParts] = [{} for _ in range(engines.ranks_per_engine)]
    for item, replicas, needed in planner.shared_holdings():
        sizes: dict[Region, int] = {}
        for coordinate, region in needed:
            if region not in sizes:
                sizes[region] = count_bytes(item.name, item.rule.dtype, region)
            part = Part(item, region, sizes[region])
            found[engines.rank(coordinate)].setdefault(replicas, []).append(part)
    return found


def bundles(
    held: HeldParts, count_bytes: CountBytes, position: int, num_engines: int, largest: float
) -> Iterator[Bundle]:
    """Yield a position's bundles, for sets of `num_engines` engines.

    Each engine gets an equal share of the bytes, up to `UNEVEN` of them or one block of rows; a
    bundle has at most about `largest` of a share."""
    share = sum_bytes(part for parts in held.values() for part in parts) / num_engines
    for member, member_parts in enumerate(_shares(held, count_bytes, num_engines, share)):
        for replicas, parts in member_parts.items():
            for run in _runs(parts, share * largest):
                size = sum_bytes(run)
                yield Bundle(
                    num_bytes=size,
                    member=member,
                    position=position,
                    replicas=replicas,
                    num_engines=num_engines,
                    is_small=size < SMALL_BUNDLE * largest * share,
                    parts=run,
                )


def sum_bytes(parts: Iterable[Part]) -> int:
    """Return the bytes of all parts."""
    return sum(part.num_bytes for part in parts)


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
