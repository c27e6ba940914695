"""Packs samples of one prompt together, so that a micro-batch computes the prompt once
(`training.shared_prompts`)."""

from collections.abc import Callable, Iterable

from megatron_r1.trainer_client.packing import Packing, pack
from megatron_r1.training.sample import Sample
from megatron_r1.training.shared_prompts import by_prompt


def pack_by_prompt(
    samples: list[Sample], num_ranks: int, limit: int, cost: Callable[[int], float]
) -> Packing:
    """Return `packing.pack` of the samples, in units of samples with the same prompt, whose tokens
    count once.

    A unit has at most `limit` tokens; where there would be fewer units than ranks, every sample is
    a unit. cost: the argument of `pack`."""
    units = [unit for members in by_prompt(samples) for unit in _within(samples, members, limit)]
    if len(units) < num_ranks:
        units = [[i] for i in range(len(samples))]
    lengths = [_shared_length(samples, unit) for unit in units]
    packing = pack(lengths, num_ranks, limit, cost=cost)
    shares = [[[i for u in m for i in units[u]] for m in own] for own in packing.shares]
    return packing._replace(shares=shares)


def _within(samples: list[Sample], members: Iterable[int], limit: int) -> list[list[int]]:
    """Cut samples of one prompt, in order, into units of at most `limit` tokens, or one sample."""
    units: list[list[int]] = []
    for member in members:
        if units and _shared_length(samples, [*units[-1], member]) <= limit:
            units[-1].append(member)
        else:
            units.append([member])
    return units


def _shared_length(samples: list[Sample], unit: list[int]) -> int:
    saved = samples[unit[0]].prompt_length - 1
    return sum(len(samples[i]) for i in unit) - saved * (len(unit) - 1)
