"""pass@k against enumeration, intervals against a known distribution, votes by meaning."""

import asyncio
import itertools
from statistics import fmean

import numpy as np
import pytest
from r1_grading import RewardPool
from refusals import raised

from megatron_r1.evaluation.estimates import estimate_mean, index_subsets, pass_at_k, powers_up_to
from megatron_r1.evaluation.voting import (
    group_answers,
    majority_index,
    majority_reward,
    read_vote,
)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(num_samples):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        samples = [1] * num_correct + [0] * (num_samples - num_correct)
        share = fmean(any(drawn) for drawn in itertools.combinations(samples, k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12), (
            num_correct,
            k,
        )


def test_pass_at_k_does_not_overflow_and_keeps_its_edges():
    # C(10000, 5000) has 3,009 digits. By hand: 1 - 5000/9999 · … ; k = 1 is the mean, exactly.
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, rel=1e-9)
    assert pass_at_k(10_000, 3, 9_998) == 1.0
    assert pass_at_k(64, 0, 64) == 0.0
    for wrong in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError, match="num_correct|pass@"):
            pass_at_k(*wrong)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 100 questions of difficulty p ~ Beta(2, 3), 4 samples each: the true pass@1 is 2 / 5. Over 200
    # evaluations the count of hits is binomial; 0.95 of them has a standard deviation of 1.5%, and
    # a percentile bootstrap of 100 questions is a little short.
    generator = np.random.default_rng(7)
    hits = 0
    for seed in range(200):
        difficulty = generator.beta(2, 3, size=100)
        found = estimate_mean(generator.binomial(4, difficulty) / 4, seed)
        hits += found.low <= 0.4 <= found.high
    assert 0.89 <= hits / 200 <= 0.985


def test_the_interval_is_that_of_questions_not_of_samples():
    # 50 questions whose 16 samples all agree hold 50 observations, not 800. The normal interval of
    # 50 coin flips is 0.5 ± 1.96 · 0.5 / sqrt(50) = ± 0.139; of 800 it would be ± 0.035.
    found = estimate_mean([float(i % 2) for i in range(50)])
    assert (found.high - found.low) / 2 == pytest.approx(0.139, abs=0.02)


def test_degenerate_cases_are_exact():
    assert estimate_mean([1.0, 1.0, 1.0]).as_json() == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert estimate_mean([0.1] * 7).value == 0.1
    assert estimate_mean([0.25]).as_json() == {"value": 0.25, "low": None, "high": None}
    assert estimate_mean([0.0, 1.0], seed=3) == estimate_mean([0.0, 1.0], seed=3)
    assert estimate_mean(np.arange(30), seed=3) != estimate_mean(np.arange(30), seed=4)
    for wrong in ([], [[1.0]], [1.0, float("nan")]):
        with raised(ValueError):
            estimate_mean(wrong)


def test_subsets_are_all_of_them_where_they_are_few_and_drawn_fairly_where_not():
    assert index_subsets(4, 2, 0) == list(itertools.combinations(range(4), 2))
    assert index_subsets(5, 5, 0) == [(0, 1, 2, 3, 4)]
    drawn = index_subsets(64, 8, 1)
    assert all(len(set(s)) == 8 and list(s) == sorted(s) for s in drawn) and len(drawn) == 100
    # 800 indices, uniform over 0…63: mean 31.5, standard error 18.5 / sqrt(800) = 0.65.
    assert fmean(i for s in drawn for i in s) == pytest.approx(31.5, abs=2.5)
    assert powers_up_to(1) == [1] and powers_up_to(6) == [1, 2, 4, 6]
    assert powers_up_to(8) == [1, 2, 4, 8]


LISTS = {
    "meaning": [
        *(r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{1/2}"),
        *(r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", r"\boxed{x^2}"),
        *(r"\boxed{C}", r"\boxed{\text{c}}", r"\boxed{1,000}", r"\boxed{1000}"),
    ],
    "equation": [r"\boxed{2x + z = 1}", r"\boxed{1}"],
    "logic": ["<answer>2 * 3</answer>", "<answer>3 * 2</answer>", "<answer>2*3</answer>"],
    "hostile": [
        *(r"\boxed{9**9**9**9}", r"\boxed{1e999999999}", r"\boxed{" + "9" * 5_000 + "}"),
        *(r"\boxed{" + "(" * 900 + "}", "no answer", r"\boxed{" + "9" * 5_000 + "}"),
    ],
}
"""Answers that are grouped; none of them is right."""
OUTVOTED = [r"\boxed{7}", r"\boxed{\frac{1}{2}}", r"\boxed{0.5}"]


@pytest.fixture(scope="module")
def graded():
    """The groups of each of the lists, and the vote on OUTVOTED, by one pool."""

    async def run():
        async with RewardPool(num_workers=1, timeout_seconds=600) as pool:
            groups = {}
            for name, answers in LISTS.items():
                votes = [read_vote(text) for text in answers]
                kind = "logic" if name == "logic" else "math"
                groups[name] = await group_answers(pool, kind, votes, [0.0] * len(answers))
            return groups, await majority_reward(pool, "math", OUTVOTED, [1.0, 0.0, 0.0])

    return asyncio.run(run())


def partition(groups):
    return {frozenset(i for i, g in enumerate(groups) if g == group) for group in set(groups)}


@pytest.mark.more
def test_answers_are_grouped_by_what_they_mean(graded):
    expected = {frozenset(s) for s in ([0, 1, 2], [3, 4], [5], [6, 7], [8, 9])}
    assert partition(graded[0]["meaning"]) == expected


def test_an_equation_does_not_join_the_number_on_its_right(graded):
    assert len(partition(graded[0]["equation"])) == 2


def test_other_kinds_are_grouped_by_text_and_number_only(graded):
    assert partition(graded[0]["logic"]) == {frozenset([0, 2]), frozenset([1])}


def test_hostile_answers_neither_hang_the_vote_nor_leave_their_group(graded):
    groups = graded[0]["hostile"]
    assert groups[4] is None and groups[2] == groups[5]
    assert len({groups[i] for i in (0, 1, 2, 3)}) == 4


def test_a_tie_goes_to_the_first_and_nobody_voting_wins_nothing():
    assert majority_index([None, 5, 3, 3, 5]) == 1
    assert majority_index([0, 7, 7]) == 1
    assert majority_index([None, None]) is None and majority_index([]) is None


class NoPool:
    """Stands where no comparison may be needed."""

    async def grade(self, *_, **__):
        raise AssertionError("compared by meaning although it cannot matter")


@pytest.mark.parametrize(
    ("answers", "truth", "reward"),
    [
        (["x+1", "1+x", "y"], "none of them", 0.0),  # nothing right
        (["7", "7", "x+1"], "7", 1.0),  # most are right
        (["7", "5", "6", "5"], "7", 0.0),  # exact numbers
        (["7", "5", "6"], "7", 1.0),  # a tie: the first
        (["5", "7", "6"], "7", 0.0),
    ],
)
def test_training_compares_by_meaning_only_where_it_can_matter(answers, truth, reward):
    texts = [rf"\boxed{{{answer}}}" for answer in answers]
    rewards = [float(answer == truth) for answer in answers]
    assert asyncio.run(majority_reward(NoPool(), "math", texts, rewards)) == reward


def test_wrong_answers_that_mean_the_same_outvote_a_right_one(graded):
    assert graded[1] == 0.0
