"""Which sample goes to which data-parallel rank and micro-batch.

Samples are packed end to end without padding, so what has to be balanced is tokens: every rank runs
the same number of micro-batches (pipeline and expert collectives demand it), none above the token
limit unless one sample alone exceeds it."""

from __future__ import annotations

import heapq


def pack(lengths: list[int], ranks: int, limit: int) -> list[list[list[int]]]:
    """Distribute samples of `lengths` tokens: result[rank][microbatch] = sample indices.

    Longest first onto the lightest bin, with the fewest micro-batches per rank that respect
    `limit`. A micro-batch is empty only where samples are too few to go round. Raises ValueError
    when there are fewer samples than ranks."""
    if len(lengths) < ranks:
        raise ValueError(
            f"{len(lengths)} samples cannot be spread over {ranks} data-parallel ranks: "
            "use larger mini-batches or fewer ranks"
        )
    longest = max(lengths)
    per_rank = -(-sum(lengths) // (ranks * limit))
    while True:
        bins = _longest_first(lengths, ranks * per_rank)
        # Ends at the latest when every sample has a bin of its own.
        if max(sum(lengths[i] for i in members) for members in bins) <= max(limit, longest):
            break
        per_rank += 1
    # Bins of like weight side by side: micro-batch m of every rank runs at the same time.
    bins.sort(key=lambda members: -sum(lengths[i] for i in members))
    return [bins[rank::ranks] for rank in range(ranks)]


def _longest_first(lengths: list[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        weight, index = heapq.heappop(heap)
        bins[index].append(sample)
        heapq.heappush(heap, (weight + lengths[sample], index))
    return bins
