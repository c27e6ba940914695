"""Bars made of characters."""

from megatron_r1.reporting.bars import columns, shares


def test_cells_left_over_go_to_the_largest_remainders():
    assert shares([5, 3, 2], 4) == [2, 1, 1]
    assert shares([1, 1, 1], 4) == [2, 1, 1]
    assert sum(shares([0.2, 3.1, 7.7, 0.05], 31)) == 31
    assert shares([0, 0], 8) == [0, 0]


def test_columns_are_means_of_equal_shares_and_a_small_value_shows():
    assert columns([1.0, 0.5, 0.0, None], 8, 1, 1.0) == ["█▄▁ "]
    assert columns([1.0, 1.0, None, 0.5, None, None], 3, 1, 1.0) == ["█▄ "]
    assert columns([0.75], 1, 2, 1.0) == ["▄", "█"]
