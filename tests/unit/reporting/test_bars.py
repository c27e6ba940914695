"""Bars made of characters."""

from megatron_r1.reporting.text_bars import bar_columns, bar_shares


def test_cells_left_over_go_to_the_largest_remainders():
    assert bar_shares([5, 3, 2], 4) == [2, 1, 1]
    assert bar_shares([1, 1, 1], 4) == [2, 1, 1]
    assert sum(bar_shares([0.2, 3.1, 7.7, 0.05], 31)) == 31
    assert bar_shares([0, 0], 8) == [0, 0]


def test_columns_are_means_of_equal_shares_and_a_small_value_shows():
    assert bar_columns([1.0, 0.5, 0.0, None], 8, 1, 1.0) == ["█▄▁ "]
    assert bar_columns([1.0, 1.0, None, 0.5, None, None], 3, 1, 1.0) == ["█▄ "]
    assert bar_columns([0.75], 1, 2, 1.0) == ["▄", "█"]
