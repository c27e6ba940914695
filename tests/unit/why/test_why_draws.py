"""The likelihood ratio behind `draws of a group`, by enumeration."""

import itertools
import math
from array import array
from types import SimpleNamespace

import pytest

from megatron_r1.why.checks.draws import log_ratio_of_one_draw

PROBABILITIES = (0.7, 0.2, 0.1)


def group_of(draws):
    """A group whose responses have one token each, of these probabilities."""
    responses = [
        SimpleNamespace(token_ids=array("i", [draw]), logprobs=[math.log(PROBABILITIES[draw])])
        for draw in draws
    ]
    return SimpleNamespace(responses=[SimpleNamespace(response=each) for each in responses])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_likelihood_ratio_has_the_mean_one_by_independent_draws(size):
    mean = sum(
        math.prod(PROBABILITIES[draw] for draw in draws)
        * math.exp(log_ratio_of_one_draw(group_of(draws)))
        for draws in itertools.product(range(3), repeat=size)
    )
    assert mean == pytest.approx(1.0, abs=1e-12)
