"""The repetition term against sets of the windows themselves."""

import asyncio
import random

import pytest
from r1_grading import RewardPool
from r1_grading.response_rewards import grade_repetition as grade


def fraction_of_different(text, window):
    windows = [text[i : i + window] for i in range(len(text) - window + 1)]
    return len(set(windows)) / len(windows)


@pytest.mark.parametrize("window", [1, 2, 7, 50])
@pytest.mark.parametrize("alphabet", ["ab", "abcdefgh", "我们先算一下", "a😀"])
def test_it_is_the_share_of_different_windows(alphabet, window):
    rng = random.Random(window)
    for length in (window, window + 1, 331):
        text = "".join(rng.choices(alphabet, k=length))
        text += text[: length // 2] * 2
        assert grade(text, window=window).reward == pytest.approx(
            fraction_of_different(text, window)
        )


def test_formulae_and_phrases_may_come_again_and_passages_may_not():
    rng = random.Random(1)
    steps = [f"so {rng.random():.12f} + x = y, " for _ in range(100)]
    assert grade("".join(steps)).reward == 1.0
    assert grade("".join(steps) * 2).reward == pytest.approx(0.5, abs=0.02)


def test_trifles_do_not_hide_a_repetition():
    passage = "Let me check this step of the argument again, from the very top. "
    marked = passage.replace("e", "e\u200b").replace("a", "a\u0301").replace(" ", "\n ").upper()
    assert grade(passage + marked).reward == grade(passage * 2).reward < 0.9
    accented = passage.replace("e", "\u00e9")  # one character, not two
    assert grade(passage + accented).reward == grade(passage * 2).reward


def test_a_counter_hides_a_loop_unless_numbers_are_masked():
    loop = "".join(f"Wait, try {number}. " for number in range(200))
    assert grade(loop).reward > 0.9
    assert grade(loop, mask_numbers=True).reward < 0.05


@pytest.mark.parametrize("response", ["", "13", " " * 500, "x" * 49])
def test_what_is_shorter_than_a_window_repeats_nothing(response):
    assert grade(response).reward == 1.0


def test_a_lone_surrogate_is_a_character_like_any_other():
    assert 0 < grade("\ud800" * 60).reward < 0.2


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "50"])
def test_a_wrong_window_is_an_error(window):
    with pytest.raises(ValueError, match=f"window.*{window!r}"):
        grade("x", window=window)


def test_a_megabyte_is_graded_within_the_limits():
    """Of memory; and of time, which quadratic work would take a hundred times of."""
    letters = random.Random(0).choices("abcdefghijklmnop ", k=10**6)
    responses = ["ab " * 333_333, "".join(letters), "\u0301\u0323" * 250_000]

    async def all_of_them():
        async with RewardPool(1, timeout_seconds=300, memory_limit_bytes=2**30) as pool:
            jobs = (pool.grade("repetition", text, None) for text in responses)
            return await asyncio.gather(*jobs)

    loop, noise, marks = asyncio.run(all_of_them())
    assert loop.reward < 1e-4 and noise.reward > 0.999 and marks.reward == 1.0
