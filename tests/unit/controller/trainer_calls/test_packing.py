import random

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.controller.trainer_calls.packing import pack_samples


def heavy_tailed(count: int, limit: int, seed: int = 0) -> list[int]:
    """Lengths such as a reasoning model's: most short, some at the limit."""
    generator = random.Random(seed)
    return [min(limit, max(100, int(generator.lognormvariate(9, 1)))) for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("limit", [128, 1_000, 10**6])
@pytest.mark.parametrize("cost", [float, lambda n: n * (1 + n / 50)])
def test_every_sample_lands_once_and_every_rank_runs_as_many_microbatches(ranks, limit, cost):
    generator = random.Random(limit + ranks)
    for count in (4, 5, 31, 256):
        lengths = [generator.randrange(1, 128) for _ in range(count)]
        plan = pack_samples(lengths, ranks, limit, cost=cost).shares
        assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(count))
        assert len({len(rank) for rank in plan}) == 1 and len(plan) == ranks
        if count == 256:
            assert all(batch for rank in plan for batch in rank)
        assert all(sum(lengths[i] for i in batch) <= limit for rank in plan for batch in rank)


def test_a_sample_longer_than_the_limit_gets_a_microbatch_alone():
    assert [0] in pack_samples([5_000, 10, 10, 10], 1, 1_000).shares[0]


def test_a_sample_goes_to_another_micro_batch_where_the_cheapest_has_no_room():
    """The three short samples cost less than the long one, and leave no room for the last."""
    packing = pack_samples([8, 3, 3, 3, 2], 1, 10, cost=lambda length: length**2)
    assert sorted(map(sorted, packing.shares[0])) == [[0, 4], [1, 2, 3]]


def test_ranks_carry_nearly_the_same_cost_where_balancing_tokens_would_not():
    lengths, ranks, cost = heavy_tailed(512, 65_536), 16, lambda n: n * (1 + n / 29_600)

    def waste(plan):
        """Ranks wait for the costliest micro-batch m of all."""
        loads = [[sum(cost(lengths[i]) for i in batch) for batch in rank] for rank in plan]
        return 1 - sum(map(sum, loads)) / (ranks * sum(map(max, zip(*loads, strict=True))))

    packing = pack_samples(lengths, ranks, 65_536, cost=cost)
    assert packing.waste_fraction == pytest.approx(waste(packing.shares))
    assert packing.waste_fraction < 0.1 < waste(pack_samples(lengths, ranks, 65_536).shares)


def test_tokens_fill_the_microbatches_that_memory_allows():
    lengths = heavy_tailed(512, 65_536)
    packing = pack_samples(lengths, 4, 65_536)
    per_rank = len(packing.shares[0])
    assert packing.fill_fraction == pytest.approx(sum(lengths) / (4 * per_rank * 65_536))
    assert packing.fill_fraction > 0.9


def test_fewer_samples_than_ranks_is_refused():
    with refused("parallel.processes", Cause.TOO_LARGE, 3, 4):
        pack_samples([1, 1, 1], 4, 100)


@pytest.mark.parametrize("ranks", [1, 3])
def test_pairs_stay_together_in_their_order(ranks):
    generator = random.Random(ranks)
    lengths = [generator.randrange(1, 100) for _ in range(40)]
    packing = pack_samples(lengths, ranks, 256, cost=lambda n: n * (1 + n / 50), samples_per_unit=2)
    microbatches = [members for rank in packing.shares for members in rank]
    assert sorted(i for members in microbatches for i in members) == list(range(40))
    for members in microbatches:
        assert all(a % 2 == 0 and b == a + 1 for a, b in zip(*[iter(members)] * 2, strict=True))
        assert len(members) == 2 or sum(lengths[i] for i in members) <= 256
    assert packing.fill_fraction == pytest.approx(sum(lengths) / (256 * len(microbatches)))


def test_fewer_pairs_than_ranks_are_refused():
    with refused("parallel.processes", Cause.TOO_LARGE, 2, 3):
        pack_samples([1, 1, 1, 1], 3, 100, samples_per_unit=2)
