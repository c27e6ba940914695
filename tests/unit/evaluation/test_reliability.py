"""Held-out measures of reward models against numbers worked out by hand."""

import math

import pytest

from megatron_r1.evaluation.score_reliability import (
    expected_calibration_error,
    label_measures,
    pair_measures,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_error_is_the_mean_gap_weighted_by_bins():
    # Bin [0.8, 0.9): 0.85 predicted 4 times, 2 came true: gap 0.35. Bin [0.1, 0.2): 0.15 predicted
    # once, came true: gap 0.85.
    probabilities, outcomes = [0.85] * 4 + [0.15], [1, 1, 0, 0, 1]
    expected = (4 * 0.35 + 1 * 0.85) / 5
    assert expected_calibration_error(probabilities, outcomes) == pytest.approx(expected)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0


def test_pairs():
    margins = [logit(0.9)] * 9 + [-logit(0.9)]
    questions = [f"q{i}" for i in range(10)]
    measures = pair_measures(questions, margins, [0.0] * 10)
    # Nine of ten times the higher one is the chosen, as the margins predict.
    assert measures["eval/accuracy"] == pytest.approx(0.9)
    assert measures["eval/calibration_error"] == pytest.approx(0, abs=1e-12)
    assert measures["eval/margin"] == pytest.approx(0.8 * logit(0.9))
    expected = -(9 * math.log(0.9) + math.log(0.1)) / 10
    assert measures["eval/loss"] == pytest.approx(expected)
    assert measures["interval/accuracy/low"] <= 0.9 <= measures["interval/accuracy/high"]


def test_labels():
    measures = label_measures(["a", "b", "c", "d"], [2.0, -1.0, 1.0, -3.0], [1.0, 0.0, 0.0, 1.0])
    assert measures["eval/accuracy"] == 0.5
    assert measures["eval/margin"] == pytest.approx((2 + 1 - 1 - 3) / 4)
    p = [1 / (1 + math.exp(-x)) for x in (2.0, -1.0, 1.0, -3.0)]
    expected = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(1 - p[2]) + math.log(p[3])) / 4
    assert measures["eval/loss"] == pytest.approx(expected)
    # Each in a bin of its own.
    gaps = (1 - p[0]) + p[1] + p[2] + (1 - p[3])
    assert measures["eval/calibration_error"] == pytest.approx(gaps / 4)


def test_a_question_counts_once_however_many_rows_it_has():
    measures = pair_measures(["a", "a", "a", "b"], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0])
    assert measures["eval/accuracy"] == 0.5


def test_huge_scores_and_ties_are_numbers():
    measures = pair_measures(["a", "b"], [1e4, 0.0], [-1e4, 0.0])
    assert measures["eval/accuracy"] == 0.5 and measures["eval/loss"] == pytest.approx(
        math.log(2) / 2
    )
    assert math.isfinite(label_measures(["a"], [-1e4], [1.0])["eval/loss"])
