"""The kernels on shards of the vocabulary, one rank each, and where each rank holds some tokens of
every sequence: against the whole, and every rank with the others."""

from pathlib import Path

import pytest
from ranks import run_under_torchrun


@pytest.mark.parametrize(
    "num_ranks",
    # One has nothing to share; of four the last has padding of the vocabulary.
    [2, *(pytest.param(n, marks=pytest.mark.more) for n in (1, 4))],
)
def test_the_ranks_parts_are_those_of_the_whole(num_ranks):
    run_under_torchrun(Path(__file__).parent, num_ranks, "kernel_ranks.py")
