import math
import random

import numpy as np
import pytest

from megatron_r1.controller.advantages import group_advantages


def test_advantages_are_the_z_scores_numpy_computes():
    generator = random.Random(3)
    for size in (2, 3, 16, 64, 256):
        rewards = [generator.choice([0.0, 0.1, 1.0, 1.1]) for _ in range(size - 1)] + [0.37]
        expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-6)
        assert group_advantages(rewards) == pytest.approx(expected.tolist(), abs=1e-12)


def test_one_right_answer_in_four_by_hand():
    # mean 1/4, std sqrt(3)/4
    got = group_advantages([1.0, 0.0, 0.0, 0.0], epsilon=0.0)
    assert got == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])


@pytest.mark.parametrize("reward", [0.0, 1.1, 0.1 + 0.2])
def test_a_group_of_equal_rewards_has_no_advantage(reward):
    assert group_advantages([reward] * 7, epsilon=0.0) == [0.0] * 7


def test_an_output_that_nobody_graded_neither_counts_nor_moves():
    graded = [1.0, 0.0, 0.0, 0.37]
    expected = group_advantages(graded)
    got = group_advantages([None, *graded[:2], None, *graded[2:]])
    assert got == [0.0, *expected[:2], 0.0, *expected[2:]]
    # Counted as 0 it would have pushed the others up.
    assert expected[0] < group_advantages([0.0, *graded])[1]
    for left in ([], [1.1]):
        assert group_advantages([None, None, *left]) == [0.0] * (2 + len(left))


def test_without_division_the_scale_of_the_rewards_stays():
    assert group_advantages([3.0, 1.0], advantage_std="none") == [1.0, -1.0]


def test_rewards_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="nan"):
        group_advantages([1.0, math.nan])
    with pytest.raises(ValueError, match="reward"):
        group_advantages([])
    with pytest.raises(ValueError, match="batch"):
        group_advantages([1.0, 0.0], advantage_std="batch")
