import random

import pytest

from megatron_r1.training.packing import pack


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("limit", [128, 1_000, 10**6])
def test_every_sample_lands_once_and_every_rank_runs_as_many_microbatches(ranks, limit):
    generator = random.Random(limit + ranks)
    for count in (4, 5, 31, 256):
        lengths = [generator.randrange(1, 128) for _ in range(count)]
        plan = pack(lengths, ranks, limit)
        assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(count))
        assert len({len(rank) for rank in plan}) == 1 and len(plan) == ranks
        if count == 256:
            assert all(batch for rank in plan for batch in rank)
        assert all(sum(lengths[i] for i in batch) <= limit for rank in plan for batch in rank)


def test_a_sample_longer_than_the_limit_gets_a_microbatch_alone():
    plan = pack([5_000, 10, 10, 10], 1, 1_000)
    assert [0] in plan[0]


def test_ranks_carry_nearly_the_same_tokens():
    generator = random.Random(0)
    lengths = [int(generator.lognormvariate(6, 1)) + 1 for _ in range(512)]
    loads = [sum(lengths[i] for b in rank for i in b) for rank in pack(lengths, 4, 16_384)]
    assert max(loads) / min(loads) < 1.05


def test_fewer_samples_than_ranks_is_refused():
    with pytest.raises(ValueError, match="3 samples cannot be spread over 4"):
        pack([1, 1, 1], 4, 100)
