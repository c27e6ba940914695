"""Win rates: the length-controlled one against torch's optimizer and judges of known bias."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_r1.evaluation.win_rates import (
    PRIOR_PRECISION,
    equal_length_win_rates,
    length_difference,
    tanh_normalize,
    win_rates,
)


def expit(logit):
    return 1 / (1 + np.exp(-logit))


def fitted_by_torch(*arrays):
    preferences, lengths, weights = map(torch.as_tensor, arrays)
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14, "max_iter": 1000}
    optimizer = torch.optim.LBFGS([parameters], line_search_fn="strong_wolfe", **exact)

    def loss():
        optimizer.zero_grad()
        logits = parameters[0] + parameters[1] * lengths
        fit = binary_cross_entropy_with_logits(logits, preferences, weights, reduction="sum")
        total = fit + PRIOR_PRECISION * (parameters**2).sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return parameters[0].detach().sigmoid().item()


@pytest.mark.parametrize("num", [2, 7, 300])
@pytest.mark.parametrize("judge", ["mixed", "always", "never", "separable"])
def test_the_fit_is_the_maximum_that_torch_finds(num, judge):
    generator = np.random.default_rng(num)
    lengths = tanh_normalize(generator.normal(200, 500, num))
    preferences = {
        "mixed": generator.choice([0, 0.25, 0.5, 1], num),
        "always": np.ones(num),
        "never": np.zeros(num),
        "separable": (lengths > np.median(lengths)).astype(float),
    }[judge]
    weights = generator.multinomial(num, np.full(num, 1 / num), size=3).astype(float)
    found = equal_length_win_rates(preferences, lengths, weights)
    expected = [fitted_by_torch(preferences, lengths, each) for each in weights]
    assert found == pytest.approx(expected, abs=1e-7)  # LBFGS's own accuracy


def compared(preferences, differences):
    return [[pair] for pair in zip(preferences, differences, strict=True)]


@pytest.mark.more
@pytest.mark.parametrize("theta", [-1.5, 0.8])
def test_known_coefficients_are_recovered_from_a_biased_judge(theta):
    generator = np.random.default_rng(1)
    differences = generator.normal(600, 700, 2000).round()  # the model writes much more
    lengths = np.tanh(differences / differences.std(ddof=1))
    preferences = generator.random(2000) < expit(theta + 1.2 * lengths)
    rates = win_rates(compared(preferences.astype(float), differences), seed=0)
    fair, raw = rates["lc_win_rate"], rates["win_rate"]
    # Over 40 other data sets the estimates deviate from the truth by 0.012 to 0.016.
    assert fair.value == pytest.approx(expit(theta), abs=4 * 0.016)
    assert 3.2 * 0.012 < fair.high - fair.low < 4.6 * 0.016
    assert raw.value == preferences.mean() and raw.value > expit(theta) + 0.08


def test_a_judge_that_only_likes_length_is_seen_through():
    generator = np.random.default_rng(2)
    differences = generator.normal(500, 600, 805).round()
    rates = win_rates(compared((differences > 0).astype(float), differences), seed=0)
    assert rates["win_rate"].value > 0.75
    assert rates["lc_win_rate"].value == pytest.approx(0.5, abs=0.06)


def test_length_that_decides_nothing_changes_nothing():
    generator = np.random.default_rng(3)
    differences = generator.normal(0, 400, 500)
    rates = win_rates(compared((generator.random(500) < 0.7).astype(float), differences), 0)
    assert rates["lc_win_rate"].value == pytest.approx(rates["win_rate"].value, abs=0.004)
    # Equal lengths say nothing of their effect: then both are the same.
    same = win_rates(compared([1.0, 1.0, 0.0, 0.5] * 100, [30] * 400), 0)
    assert same["lc_win_rate"].value == pytest.approx(same["win_rate"].value, abs=1e-3)


def test_questions_weigh_the_same_and_intervals_resample_whole_ones():
    few, many = [(1.0, 5), (1.0, -5)], [(0.0, 5), (0.0, -5)] * 5
    assert win_rates([few, many], 0)["win_rate"].value == 0.5
    assert win_rates([few, many], 0)["lc_win_rate"].value == pytest.approx(0.5, abs=1e-9)
    generator = np.random.default_rng(4)
    alone = [[(float(x), int(d))] for x, d in zip(*generator.integers(0, 2, (2, 60)), strict=True)]
    copies = [samples * 4 for samples in alone]
    once, again = (win_rates(each, 7)["lc_win_rate"] for each in (alone, copies))
    # Copies are no news: neither the estimate nor its interval moves (s has n - 1 below).
    expected = pytest.approx((once.value, once.low, once.high), abs=1e-4)
    assert (again.value, again.low, again.high) == expected
    assert once == win_rates(alone, 7)["lc_win_rate"] and once.low < once.value < once.high
    assert win_rates([few], 0)["lc_win_rate"].low is None


@pytest.mark.parametrize(
    ("response", "thought_opened", "part", "expected"),
    [
        ("<think>long, long thought</think> abcde ", False, "summary", 2),
        ("long, long thought</think>abcde", True, "summary", 2),
        ("never closed", True, "summary", -3),
        ("abcde", False, "response", 2),
    ],
)
def test_the_length_is_that_of_what_the_judge_reads(response, thought_opened, part, expected):
    assert length_difference(response, thought_opened, "abc", part) == expected
