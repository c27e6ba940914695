"""The length term against DAPO's equation, written out again."""

import pytest
from r1_grading.response_rewards import grade_conciseness as grade

LIMITS = {"free_length": 12_288, "max_length": 16_384}


def soft_overlong_punishment(length, maximum, cache):
    """DAPO, eq. 13."""
    if length <= maximum - cache:
        return 0.0
    if length <= maximum:
        return ((maximum - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize("length", [0, 1, 12_287, 12_288, 12_289, 14_336, 16_383, 16_384, 99_999])
def test_it_is_dapos_punishment_plus_1(length):
    expected = 1 + soft_overlong_punishment(length, 16_384, 16_384 - 12_288)
    assert grade("x", num_tokens=length, **LIMITS).reward == pytest.approx(expected)


def test_characters_are_counted_when_asked_for_and_tokens_are_never_guessed():
    limits = {"free_length": 0, "max_length": 10}
    assert grade("12345", unit="characters", num_tokens=9, **limits).reward == 0.5
    assert grade("12345", num_tokens=9, **limits).reward == pytest.approx(0.1)
    with pytest.raises(ValueError, match="num_tokens.*None"):
        grade("12345", **limits)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"free_length": 10, "max_length": 10}, "max_length.*10.*10"),
        ({"free_length": -1, "max_length": 10}, "max_length.*-1"),
        ({"free_length": "en", "max_length": 10}, "free_length.*'en'"),
        ({"free_length": 1, "max_length": 10, "unit": "words"}, "unit.*'words'"),
        ({"free_length": 1, "max_length": 10, "num_tokens": True}, "num_tokens.*True"),
        ({"free_length": 1, "max_length": float("nan")}, "max_length.*nan"),
    ],
)
def test_wrong_settings_are_errors_that_name_them(settings, named):
    with pytest.raises(ValueError, match=named):
        grade("x", **settings)
