"""Distributes samples over data-parallel ranks and micro-batches.

Samples are packed end to end without padding. Every rank runs the same number of micro-batches
(pipeline and expert collectives require it), and all ranks run micro-batch m at the same time, so
the cost of micro-batch m, not its tokens, should be equal on every rank. The size of a micro-batch
is limited in tokens, which determine its memory."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from megatron_r1.errors import Cause, UserError

Bins = list[list[int]]
"""The samples of each micro-batch, as indices."""


class Packing(NamedTuple):
    """An assignment of samples to ranks and micro-batches.

    shares[rank][m]: indices of the samples of micro-batch m on that rank. waste: the share of all
    ranks' time spent waiting for the rank with the costliest micro-batch. fill: mean of tokens per
    micro-batch / limit."""

    shares: list[Bins]
    waste: float
    fill: float


def pack(
    lengths: list[int],
    num_ranks: int,
    limit: int,
    *,
    cost: Callable[[int], float] = float,
    unit: int = 1,
) -> Packing:
    """Distribute samples of `lengths` tokens over `num_ranks` ranks.

    limit: tokens of a micro-batch; only a sample longer than that exceeds it, and is then alone.
    cost: length -> cost of a sample (`sample_cost`). unit: number of consecutive samples that stay
    together, in their order (a pair of responses). There are as few micro-batches as a greedy
    packing needs: more never waste less (measured on log-normal lengths). A micro-batch is empty
    only where there are too few samples. Raises UserError when there are fewer samples, or units,
    than ranks."""
    starts = range(0, len(lengths), unit)
    costs = [sum(cost(length) for length in lengths[i : i + unit]) for i in starts]
    lengths = [sum(lengths[i : i + unit]) for i in starts]
    if len(lengths) < num_ranks:
        samples = "samples" if unit == 1 else f"units of {unit} samples"
        raise UserError(
            f"{len(lengths)} {samples} cannot be spread over {num_ranks} data-parallel ranks: "
            "use larger mini-batches (fewer rl.minibatches, a larger sft.batch_size or "
            "reward_model.batch_size) or fewer parallel.processes",
            key="parallel.processes",
            cause=Cause.TOO_LARGE,
        )
    fewest = -(-sum(lengths) // (num_ranks * limit))
    for per_rank in count(fewest):
        bins = _costliest_first(costs, lengths, num_ranks * per_rank, limit)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= limit for b in bins):
            shares, waste, fill = _side_by_side(bins, lengths, costs, num_ranks, limit)
            whole = [
                [[i * unit + k for i in m for k in range(unit)] for m in own] for own in shares
            ]
            return Packing(whole, waste, fill)
    raise AssertionError("one bin for every sample always fits")


def _side_by_side(
    bins: Bins, lengths: list[int], costs: list[float], num_ranks: int, limit: int
) -> Packing:
    """Put bins of similar cost at the same m on all ranks, the costliest first."""
    totals = {id(b): sum(costs[i] for i in b) for b in bins}
    ordered = sorted(bins, key=lambda b: -totals[id(b)])
    rows = [ordered[i : i + num_ranks] for i in range(0, len(ordered), num_ranks)]
    waited = num_ranks * sum(totals[id(row[0])] for row in rows)
    # The rank that has the costliest of one row gets the cheapest of the next.
    shares = [
        [row[rank if m % 2 == 0 else num_ranks - 1 - rank] for m, row in enumerate(rows)]
        for rank in range(num_ranks)
    ]
    waste = 1 - sum(totals.values()) / waited if waited else 0.0
    return Packing(shares, max(0.0, waste), sum(lengths) / (limit * len(bins)))


def _costliest_first(costs: list[float], lengths: list[int], num_bins: int, limit: int) -> Bins:
    """Put each sample, the costliest first, into the cheapest bin that has room for it."""
    members: Bins = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for sample in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        full = []
        while heap:
            total, best = heapq.heappop(heap)
            if not members[best] or tokens[best] + lengths[sample] <= limit:
                break
            full.append((total, best))
        else:
            total, best = full.pop(0)  # no bin has room: the caller tries more bins
        members[best].append(sample)
        tokens[best] += lengths[sample]
        for entry in (*full, (total + costs[sample], best)):
            heapq.heappush(heap, entry)
    return members
