"""Which sample goes to which data-parallel rank and micro-batch.

Samples are packed end to end without padding. Every rank runs the same number of micro-batches
(pipeline and expert collectives demand it) and all ranks run micro-batch m at the same time, so
what has to be equal is the cost of micro-batch m on every rank; what bounds a micro-batch is its
tokens, for they are its memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

Bins = list[list[int]]


@dataclass(frozen=True)
class Packing:
    """shares[rank][m]: the samples of micro-batch m on that rank. waste: the share of all ranks'
    time spent waiting for the rank with the costliest micro-batch. fill: tokens per micro-batch
    over the limit, mean."""

    shares: list[Bins]
    waste: float
    fill: float


def pack(
    lengths: list[int],
    ranks: int,
    limit: int,
    *,
    cost: Callable[[int], float] = float,
    unit: int = 1,
) -> Packing:
    """Distribute samples of `lengths` tokens over `ranks`.

    limit: tokens of a micro-batch; only a sample longer than that exceeds it, and is then alone.
    cost: of a sample of some length (`cost.sample_cost`). unit: so many samples that follow each
    other count as one: they stay together, in their order (a pair of responses). There are as few
    micro-batches as the limit allows: more never waste less (measured on log-normal lengths). One
    is empty only where samples are too few to go round. Raises ValueError when there are fewer
    samples, or units, than ranks."""
    costs = [cost(length) for length in lengths]
    starts = range(0, len(lengths), unit)
    costs, lengths = ([sum(v[i : i + unit]) for i in starts] for v in (costs, lengths))
    if len(lengths) < ranks:
        samples = "samples" if unit == 1 else f"units of {unit} samples"
        raise ValueError(
            f"{len(lengths)} {samples} cannot be spread over {ranks} data-parallel ranks: "
            "use larger mini-batches or fewer ranks"
        )
    fewest = -(-sum(lengths) // (ranks * limit))
    for per_rank in count(fewest):
        bins = _costliest_first(costs, lengths, ranks * per_rank, limit)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= limit for b in bins):
            return _opened(_side_by_side(bins, lengths, costs, ranks, limit), unit)
    raise AssertionError("at the latest a bin for every sample fits")


def _opened(packing: Packing, unit: int) -> Packing:
    """With the samples of each unit in its place."""
    shares = [
        [[i * unit + k for i in members for k in range(unit)] for members in share]
        for share in packing.shares
    ]
    return Packing(shares, packing.waste, packing.fill)


def _side_by_side(
    bins: Bins, lengths: list[int], costs: list[float], ranks: int, limit: int
) -> Packing:
    """Bins of like cost at the same m, the costliest first: no rank waits long for another."""
    totals = {id(b): sum(costs[i] for i in b) for b in bins}
    ordered = sorted(bins, key=lambda b: -totals[id(b)])
    rows = [ordered[i : i + ranks] for i in range(0, len(ordered), ranks)]
    waited = ranks * sum(totals[id(row[0])] for row in rows)
    # The rank that has the costliest of one row gets the cheapest of the next.
    shares = [
        [row[rank if m % 2 == 0 else ranks - 1 - rank] for m, row in enumerate(rows)]
        for rank in range(ranks)
    ]
    waste = 1 - sum(totals.values()) / waited if waited else 0.0
    return Packing(shares, max(0.0, waste), sum(lengths) / (limit * len(bins)))


def _costliest_first(costs: list[float], lengths: list[int], bins: int, limit: int) -> Bins:
    """Each sample, the costliest first, into the cheapest bin that still has room for it."""
    members: Bins = [[] for _ in range(bins)]
    tokens = [0] * bins
    heap = [(0.0, b) for b in range(bins)]
    for sample in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        passed = []
        while heap:
            total, best = heapq.heappop(heap)
            if not members[best] or tokens[best] + lengths[sample] <= limit:
                break
            passed.append((total, best))
        else:
            total, best = passed.pop(0)  # no room anywhere: this way will not fit
        members[best].append(sample)
        tokens[best] += lengths[sample]
        for entry in (*passed, (total + costs[sample], best)):
            heapq.heappush(heap, entry)
    return members
