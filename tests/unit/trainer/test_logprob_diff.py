"""Differences of log-probabilities over response tokens, by hand."""

import math
from types import SimpleNamespace

import torch

from megatron_r1.trainer.metrics import Maximum, Mean, logprob_diff, teacher_kl


def batch(old, engine, is_response, teacher=()):
    return SimpleNamespace(
        logprobs={"old": torch.tensor(old), "teacher": torch.tensor(teacher)},
        rollout_logprobs=torch.tensor(engine),
        is_response=torch.tensor(is_response),
        response_positions=torch.tensor(is_response).nonzero()[:, 0],
    )


TWO = [
    batch([-1.0, -2.0, -9.0], [-1.5, -1.0, 0.0], [True, True, False], [-3.0, -1.0, 0.0]),
    batch([-0.5], [-0.25], [True], [-0.75]),
]


def test_the_gap_to_the_engine_is_over_response_tokens_of_all_batches():
    assert logprob_diff(TWO, "old") == (Mean(1.75, 3), Maximum(1.0))


def test_the_gap_over_no_token_is_over_none():
    assert logprob_diff([batch([-1.0], [-2.0], [False])], "old") == (Mean(0.0, 0), Maximum(0.0))


def test_a_nan_is_the_largest_gap():
    _, largest = logprob_diff([batch([math.nan], [-1.0], [True]), TWO[1]], "old")
    assert math.isnan(largest.value)


def test_the_teacher_s_divergence_keeps_its_sign():
    assert teacher_kl(TWO) == Mean(2.0 - 1.0 + 0.25, 3)
