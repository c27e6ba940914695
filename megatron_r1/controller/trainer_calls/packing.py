"""Distributes samples over data-parallel ranks and micro-batches, and refuses recipes whose batches
are too small for the ranks.

Samples are packed end to end without padding. Every rank runs the same number of micro-batches
(pipeline and expert collectives require it), and all ranks run micro-batch m at the same time, so
the cost of micro-batch m, not its tokens, should be equal on every rank. The size of a micro-batch
is limited in tokens, which determine its memory. `models.compute_cost` is the cost of a sample."""

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.reporting.formatting import format_count
from megatron_r1.trainer.prefix_matching import PrefixMatcher, group_by_first_prompt
from megatron_r1.trainer.training_sample import Sample

Bins = list[list[int]]
"""The samples of each micro-batch, as indices."""


class Packing(NamedTuple):
    """An assignment of samples to ranks and micro-batches.

    Attributes:
        shares: shares[rank][m] are the indices of the samples of micro-batch m on that rank.
        waste_fraction: the share of all ranks' time spent waiting for the rank with the costliest
            micro-batch.
        fill_fraction: mean of tokens per micro-batch / max_tokens."""

    shares: list[Bins]
    waste_fraction: float
    fill_fraction: float


def pack_samples(
    lengths: list[int],
    data_parallel_size: int,
    max_tokens: int,
    *,
    cost: Callable[[int], float] = float,
    samples_per_unit: int = 1,
) -> Packing:
    """Distribute samples of `lengths` tokens over `data_parallel_size` ranks.

    There are as few micro-batches as a greedy packing needs: more never waste less (measured on
    log-normal lengths). A micro-batch is empty only where there are too few samples.

    Args:
        lengths: tokens of each sample.
        data_parallel_size: the number of data-parallel ranks.
        max_tokens: tokens of a micro-batch; only a sample longer than that exceeds it, and is then
            alone.
        cost: length -> cost of a sample (`models.compute_cost`).
        samples_per_unit: number of consecutive samples that stay together, in their order (two
            for a pair of responses).

    Raises:
        UserError: fewer samples, or units, than ranks."""
    starts = range(0, len(lengths), samples_per_unit)
    costs = [sum(cost(length) for length in lengths[i : i + samples_per_unit]) for i in starts]
    lengths = [sum(lengths[i : i + samples_per_unit]) for i in starts]
    if len(lengths) < data_parallel_size:
        samples = "samples" if samples_per_unit == 1 else f"units of {samples_per_unit} samples"
        raise UserError(
            f"{len(lengths)} {samples} cannot be spread over {data_parallel_size} data-parallel "
            "ranks: use larger mini-batches (fewer rl.minibatches, a larger sft.batch_size or "
            "reward_model.batch_size) or fewer parallel.processes",
            key="parallel.processes",
            cause=Cause.TOO_LARGE,
        )
    min_bins = -(-sum(lengths) // (data_parallel_size * max_tokens))
    for per_rank in range(min_bins, max(min_bins, len(lengths)) + 1):
        bins = _costliest_first(costs, lengths, data_parallel_size * per_rank, max_tokens)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= max_tokens for b in bins):
            packing = _side_by_side(bins, lengths, costs, data_parallel_size, max_tokens)
            members = range(samples_per_unit)
            sample_shares = [
                [[i * samples_per_unit + k for i in m for k in members] for m in share]
                for share in packing.shares
            ]
            return packing._replace(shares=sample_shares)
    raise AssertionError("a bin for every unit always fits")


def _side_by_side(
    bins: Bins, lengths: list[int], costs: list[float], data_parallel_size: int, max_tokens: int
) -> Packing:
    """Put bins of similar cost at the same m on all ranks, the costliest first."""
    totals = {id(b): sum(costs[i] for i in b) for b in bins}
    ordered_bins = sorted(bins, key=lambda b: -totals[id(b)])
    rows = [
        ordered_bins[i : i + data_parallel_size]
        for i in range(0, len(ordered_bins), data_parallel_size)
    ]
    cost_with_waits = data_parallel_size * sum(totals[id(row[0])] for row in rows)
    # The rank that has the costliest of one row gets the cheapest of the next.
    shares = [
        [row[rank if m % 2 == 0 else data_parallel_size - 1 - rank] for m, row in enumerate(rows)]
        for rank in range(data_parallel_size)
    ]
    waste = 1 - sum(totals.values()) / cost_with_waits if cost_with_waits else 0.0
    return Packing(shares, max(0.0, waste), sum(lengths) / (max_tokens * len(bins)))


def _costliest_first(
    costs: list[float], lengths: list[int], num_bins: int, max_tokens: int
) -> Bins:
    """Put each sample, the costliest first, into the cheapest bin that has room for it."""
    members: Bins = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for sample in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        full_bins = []
        while heap:
            bin_cost, bin_index = heapq.heappop(heap)
            if not members[bin_index] or tokens[bin_index] + lengths[sample] <= max_tokens:
                break
            full_bins.append((bin_cost, bin_index))
        else:
            bin_cost, bin_index = full_bins.pop(0)  # no bin has room: the caller tries more bins
        members[bin_index].append(sample)
        tokens[bin_index] += lengths[sample]
        for entry in (*full_bins, (bin_cost + costs[sample], bin_index)):
            heapq.heappush(heap, entry)
    return members


def pack_by_prompt(
    samples: list[Sample], data_parallel_size: int, max_tokens: int, cost: Callable[[int], float]
) -> Packing:
    """Return `pack_samples` of the samples, in units of samples that begin with the same prompt,
    whose shared tokens count once.

    A unit has at most `max_tokens` tokens; where there would be fewer units than ranks, every
    sample is a unit.

    Args:
        samples: the samples of a mini-batch.
        data_parallel_size: the number of data-parallel ranks.
        max_tokens: the most tokens of a micro-batch.
        cost: the argument of `pack_samples`."""
    units_with_lengths = [
        unit
        for group in group_by_first_prompt(samples)
        for unit in _split_to_limit(samples, group, max_tokens)
    ]
    if len(units_with_lengths) < data_parallel_size:
        units_with_lengths = [([i], len(sample)) for i, sample in enumerate(samples)]
    units = [unit for unit, _ in units_with_lengths]
    lengths = [length for _, length in units_with_lengths]
    packing = pack_samples(lengths, data_parallel_size, max_tokens, cost=cost)
    shares = [[[i for u in m for i in units[u]] for m in share] for share in packing.shares]
    return packing._replace(shares=shares)


def _split_to_limit(
    samples: list[Sample], members: Iterable[int], max_tokens: int
) -> list[tuple[list[int], int]]:
    """Cut samples of one prompt, in order, into units of at most `max_tokens` tokens, or one
    sample. Return each unit with its tokens."""
    units: list[tuple[list[int], int]] = []
    matcher = PrefixMatcher()
    for member in members:
        sample = samples[member]
        _, num_skipped = matcher.shared_prefix(sample)
        if units and units[-1][1] + len(sample) - num_skipped <= max_tokens:
            unit, length = units.pop()
        else:
            unit, length, matcher = [], 0, PrefixMatcher()
        units.append(([*unit, member], length + matcher.add(sample)))
    return units


def check_batches(config: Config, verb: str, world_size: int, rank: str = "trainer rank") -> None:
    """Refuse batches that do not give each data-parallel rank a sample.

    Args:
        config: the recipe.
        verb: rl, sft or reward-model.
        world_size: the number of ranks, the data-parallel ones among them.
        rank: what a data-parallel rank is called.

    Raises:
        UserError: an optimizer step has too few samples."""
    rl, item = config.rl, "sample"
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    if verb == "rl":
        num_samples = rl.prompts_per_rollout * rl.group_size // rl.minibatches
        key, remedy = "rl.prompts_per_rollout", "raise rl.prompts_per_rollout"
        if rl.minibatches > 1:
            key, remedy = "rl.minibatches", f"lower rl.minibatches={rl.minibatches}"
    else:
        section = verb.replace("-", "_")
        key, num_samples = f"{section}.batch_size", getattr(config, section).batch_size
        remedy = f"raise {key}"
        if verb == "reward-model" and config.reward_model.kind == "pairwise":
            item = "pair"  # stays together on one rank (`samples_per_unit`)
    if num_samples < data_parallel_size:
        max_ranks = num_samples * (world_size // data_parallel_size)
        raise UserError(
            f"{format_count(num_samples, item)} of an optimizer step cannot be spread over "
            f"{data_parallel_size:,} data-parallel ranks; {remedy}, raise parallel.context, "
            f".tensor or .pipeline, or use at most {format_count(max_ranks, rank)}",
            key=key,
            cause=Cause.OUT_OF_RANGE,
        )
