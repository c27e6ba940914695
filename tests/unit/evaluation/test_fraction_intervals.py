"""Intervals of sampled fractions, against sums over all samples in whole numbers."""

import itertools
from math import comb

import pytest

from megatron_r1.evaluation.fraction_intervals import combined_fraction, sampled_fraction


def chance(found, population, marked, sampled):
    """P(X = found) as a ratio of whole numbers."""
    if found > marked or sampled - found > population - marked:
        return 0.0
    ways = comb(marked, found) * comb(population - marked, sampled - found)
    return ways / comb(population, sampled)


@pytest.mark.parametrize(
    ("population", "sampled"), [(1, 1), (2, 1), (7, 3), (30, 10), (30, 29), (30, 30), (200, 25)]
)
def test_one_stratum_is_covered_at_least_as_often_as_it_says_for_every_true_count(
    population, sampled
):
    fractions = [sampled_fraction(population, sampled, found) for found in range(sampled + 1)]
    for marked in range(population + 1):
        covered = sum(
            chance(found, population, marked, sampled)
            for found, fraction in enumerate(fractions)
            if round(fraction.low * population) <= marked <= round(fraction.high * population)
        )
        assert covered >= 0.95 - 1e-12, (marked, covered)


@pytest.mark.parametrize(("population", "sampled"), [(30, 10), (57, 20)])
def test_the_interval_has_exactly_the_counts_that_neither_tail_rejects(population, sampled):
    for found in range(sampled + 1):
        kept = [
            marked
            for marked in range(population + 1)
            if sum(chance(x, population, marked, sampled) for x in range(found + 1)) > 0.025
            and sum(chance(x, population, marked, sampled) for x in range(found, sampled + 1))
            > 0.025
        ]
        fraction = sampled_fraction(population, sampled, found)
        ends = fraction.low * population, fraction.high * population
        assert ends == pytest.approx((kept[0], kept[-1])), found


def test_in_a_large_population_it_is_clopper_and_pearsons():
    fraction = sampled_fraction(10**7, 20, 0)
    assert (fraction.low, fraction.high) == pytest.approx((0, 1 - 0.025 ** (1 / 20)), abs=1e-5)
    fraction = sampled_fraction(10**7, 20, 20)
    assert (fraction.low, fraction.high) == pytest.approx((0.025 ** (1 / 20), 1), abs=1e-5)
    # 4 of 15, of a published table: 7.8% to 55.1%.
    fraction = sampled_fraction(10**7, 15, 4)
    assert (fraction.low, fraction.high) == pytest.approx((0.078, 0.551), abs=5e-4)


def test_undecided_members_count_both_ways():
    fraction = sampled_fraction(1_000, 50, 5, 10)
    assert fraction.low == sampled_fraction(1_000, 50, 5).low
    assert fraction.high == sampled_fraction(1_000, 50, 15).high
    assert fraction.value == 5 / 40
    assert sampled_fraction(10, 4, 0, 4).value is None
    whole = sampled_fraction(10, 10, 2, 3)
    assert (whole.low, whole.high) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("sizes", "sampled", "marked"),
    [
        ((40, 400), (20, 20), (4, 20)),
        ((100, 100), (15, 15), (0, 30)),
        ((60, 300), (10, 30), (3, 9)),
        ((500, 20), (25, 20), (50, 20)),
        ((200, 200), (20, 20), (2, 2)),
    ],
)
def test_two_strata_together_are_covered_as_often_as_they_say(sizes, sampled, marked):
    truth = sum(marked) / sum(sizes)
    covered = 0.0
    for found in itertools.product(*(range(n + 1) for n in sampled)):
        fraction = combined_fraction(
            [sampled_fraction(*counts) for counts in zip(sizes, sampled, found, strict=True)]
        )
        if fraction.low <= truth <= fraction.high:
            covered += chance(found[0], sizes[0], marked[0], sampled[0]) * chance(
                found[1], sizes[1], marked[1], sampled[1]
            )
    assert covered >= 0.95, covered


def test_strata_weigh_as_their_populations_and_keep_their_undecided():
    fractions = [sampled_fraction(100, 10, 5), sampled_fraction(300, 10, 0, 10)]
    together = combined_fraction([fractions[0], sampled_fraction(300, 10, 1)])
    assert together.value == pytest.approx(0.25 * 0.5 + 0.75 * 0.1)
    assert combined_fraction(fractions).value is None
    assert combined_fraction(fractions).high > 0.75
    assert combined_fraction(fractions[:1]) == fractions[0]


@pytest.mark.parametrize("counts", [(3, 4, 0), (3, 0, 0), (9, 3, 4), (9, 3, 2, 2), (9, 3, -1)])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match=str(counts[2])):
        sampled_fraction(*counts)
