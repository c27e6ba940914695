"""Policy losses where each rank holds some tokens of every sequence."""

from pathlib import Path

import pytest
from ranks import run_under_torchrun


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_ranks_parts_add_up_to_the_whole(num_ranks):
    output = run_under_torchrun(Path(__file__).parent, num_ranks, "sequence_ranks.py")
    assert "all agree" in output
