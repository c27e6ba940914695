"""The losses of reward models against their formulae, text by text."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_r1.trainer.reward_losses import pairwise, pointwise

SCORES = [2.0, -0.5, 0.25, 1.0]


def given(num_responses=4, labels=()):
    batch = SimpleNamespace(num_responses=num_responses, labels=torch.tensor(labels))
    return batch, SimpleNamespace(last_token_scores=lambda: torch.tensor(SCORES))


def mean(metric):
    return float(metric.total) / float(metric.count)


def test_a_pair_has_the_loss_of_bradley_and_terry():
    terms = pairwise(*given())
    wanted = sum(math.log1p(math.exp(-(a - b))) for a, b in ((2.0, -0.5), (0.25, 1.0)))
    assert terms.loss.item() == pytest.approx(wanted)
    assert terms.denominator.item() == 2
    assert mean(terms.metrics["accuracy"]) == 0.5
    assert mean(terms.metrics["margin"]) == pytest.approx((2.5 - 0.75) / 2)


def test_a_text_has_the_cross_entropy_of_its_label():
    labels = [1.0, 0.0, 0.0, 1.0]
    terms = pointwise(*given(labels=labels))
    sigmoid = [1 / (1 + math.exp(-score)) for score in SCORES]
    wanted = -sum(math.log(p if y else 1 - p) for p, y in zip(sigmoid, labels, strict=True))
    assert terms.loss.item() == pytest.approx(wanted)
    assert terms.denominator.item() == 4
    assert mean(terms.metrics["accuracy"]) == 0.75


def test_only_the_first_context_rank_counts_its_texts():
    # The others have num_responses 0; their loss is there for its gradient.
    terms = pairwise(*given(num_responses=0))
    assert terms.denominator.item() == 0 and terms.loss.item() > 0
    assert all(float(m.total) == 0 for m in terms.metrics.values())
