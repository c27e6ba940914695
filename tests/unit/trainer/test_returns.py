"""Rewards to go and generalized advantages of packed responses, against a loop over each token."""

import math
import random

import numpy as np
import pytest
import torch

from megatron_r1.trainer.token_advantages import (
    discounted_sums,
    gae,
    kl_penalized_rewards,
    standardize,
    sums_for_standardization,
)

# (tokens before the response, its tokens, tokens after it, whether it was graded); the second is
# without a response, as padding is. Of the last two responses every third token was given.
SAMPLES = [
    *((2, 1, 1, True), (3, 0, 0, True), (1, 7, 4, True), (4, 6, 1, False), (1, 33, 1, True)),
    *((2, 20, 1, True), (1, 5, 0, True)),
]
TOTAL = sum(before + length + after for before, length, after, _ in SAMPLES)


def layout():
    """Each response's positions and whether it was graded; the mask and `last` of all tokens."""
    spans, mask, last, start = [], [False] * TOTAL, [-1] * TOTAL, 0
    for number, (before, length, after, is_graded) in enumerate(SAMPLES):
        span = [*range(start + before, start + before + length)]
        if number >= 5:
            del span[2::3]
        end = span[-1] if span else -1
        for t in range(start, start + before + length + after):
            mask[t] = is_graded and t in span
            last[t] = end
        spans.append((span, is_graded))
        start += before + length + after
    return spans, torch.tensor(mask), torch.tensor(last)


def numbers(seed):
    draw = random.Random(seed)
    return [draw.gauss(0, 1) for _ in range(TOTAL)]


def fp64(values):
    return torch.tensor(values, dtype=torch.float64)


def rewards_by_hand(spans, grades, old, ref, beta):
    made = [0.0] * TOTAL
    for span, is_graded in spans:
        for t in span if is_graded else []:
            made[t] = -beta * (old[t] - ref[t]) + (grades[t] if t == span[-1] else 0.0)
    return made


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_penalized_rewards_are_the_loop_s(beta):
    spans, mask, last = layout()
    old, ref = numbers(1), numbers(2)
    grades = [math.nan] * TOTAL
    for number, (span, is_graded) in enumerate(spans):
        for t in span if is_graded else []:
            grades[t] = 1.5 + number
    got = kl_penalized_rewards(fp64(grades), fp64(old) - fp64(ref), beta, mask, last)
    wanted = rewards_by_hand(spans, grades, old, ref, beta)
    # One product and two sums in fp64.
    torch.testing.assert_close(got, fp64(wanted), rtol=1e-15, atol=1e-15)
    if not beta:
        assert torch.equal(kl_penalized_rewards(fp64(grades), None, 0.0, mask, last), got)


@pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
def test_discounted_sums_are_the_loop_s(discount):
    spans, mask, last = layout()
    values, wanted = numbers(3), [0.0] * TOTAL
    for span, is_graded in spans:
        for i, t in enumerate(span if is_graded else []):
            wanted[t] = sum(discount**n * values[s] for n, s in enumerate(span[i:]))
    given = fp64(values).where(mask, math.nan)  # outside the mask nothing is read
    got = discounted_sums(given, discount, mask, last)
    # 33 terms at most, added in another order.
    torch.testing.assert_close(got, fp64(wanted), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 1.0), (0.95, 0.9), (1.0, 0.0), (0.0, 1.0)])
def test_generalized_advantages_are_the_loop_s(discount, lam):
    spans, mask, last = layout()
    rewards, values = numbers(4), numbers(5)
    advantages, returns = [0.0] * TOTAL, list(values)
    for span, is_graded in spans:
        following, running = 0.0, 0.0  # after the last token
        for t in reversed(span) if is_graded else []:
            running = rewards[t] + discount * following - values[t] + discount * lam * running
            advantages[t], returns[t], following = running, running + values[t], values[t]
    got = gae(fp64(rewards), fp64(values), discount, lam, mask, last)
    # 33 terms at most, added in another order.
    torch.testing.assert_close(got[0], fp64(advantages), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got[1], fp64(returns), rtol=1e-13, atol=1e-13)


def test_parts_are_standardized_by_the_moments_of_the_whole():
    parts = torch.randn(3, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, -2.0])
    whole = np.concatenate(parts).astype(np.float64)
    total = sums_for_standardization(parts[0]) + sums_for_standardization(parts[1])
    for part in parts:
        wanted = (part.double().numpy() - whole.mean()) / (whole.std() + 1e-6)
        assert standardize(part, total, 1e-6).numpy() == pytest.approx(wanted, abs=1e-6)
    equal = torch.full((3,), 0.1)
    assert standardize(equal, sums_for_standardization(equal), 0.0).tolist() == pytest.approx(
        [0.0] * 3, abs=1e-7
    )
