"""The kernels on shards of the vocabulary, one rank each."""

from pathlib import Path

import pytest
from ranks import run_under_torchrun


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_agree_with_the_whole_and_every_rank_with_the_others(num_ranks):
    output = run_under_torchrun(Path(__file__).parent, num_ranks, "vocabulary_ranks.py")
    assert "all agree" in output
